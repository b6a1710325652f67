"""Object detection as a task: COCO's average precision, boxes in the report and in predict.py."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slimkit.errors import ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks.data.sources import find_folder
from slimkit.tasks.detection.detectors import (
    Suppression,
    classes_of,
    dense,
    detector_loss,
    finder,
    is_list_detector,
    suppressed,
)
from slimkit.tasks.detection.digit_scenes import read_digit_scenes
from slimkit.tasks.detection.loading import SCENE_SOURCES, load_scenes, splits_of
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet
from slimkit.tasks.detection.scoring import (
    AveragePrecision,
    Detections,
    average_precision,
    require_evaluator,
)
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.drawing import Drawing, lines, picture, samples, table
from slimkit.tasks.interface import Answer, Metric, SettingsClass, Task
from slimkit.tasks.prediction import model_metadata
from slimkit.tasks.running import Run, device_of, in_training, module_run
from slimkit.tasks.splits import Splits

__all__ = ["DetectionTask"]

_SMOKE_BATCH = 2
_SHOWN_IMAGES = 6
"""Images in the report: enough for an impression, few enough for the page's size."""

_SHOWN_SCORE = 0.4
"""Boxes below it are not drawn: they are there for the curve, not for people."""


class DetectionTask(Task):
    """Boxes and classes of the objects in an image.

    Attributes:
        score: boxes below it are left out before non-maximum suppression.
        nms_iou: of two boxes of a class that overlap more, the better one stays.
        max_detections: boxes per image.
    """

    data_settings: ClassVar[SettingsClass] = DetectionDataSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("map", "mAP"),
        Metric("map50", "AP50"),
        Metric("map75", "AP75"),
        Metric("map_small", "mAP of small objects"),
        Metric("map_medium", "mAP of medium objects"),
        Metric("map_large", "mAP of large objects"),
    )

    script: ClassVar[str] = "slimkit.tasks.detection.predict_boxes"

    type: Literal["detection"] = "detection"
    score: float = Field(default=0.025, ge=0, lt=1)
    nms_iou: float = Field(default=0.6, gt=0, le=1)
    max_detections: int = Field(default=100, ge=1, le=10_000)

    @property
    def suppression(self) -> Suppression:
        """Non-maximum suppression by these settings."""
        return Suppression(self.score, self.nms_iou, most=self.max_detections)

    def load(self, settings: DetectionDataSettings) -> Splits:
        """See the base class."""
        require_evaluator()
        return load_scenes(settings)

    def synthetic(
        self, settings: DetectionDataSettings, model: nn.Module, *, batches: int
    ) -> Splits:
        """See the base class: a few digit scenes, their labels folded to the model's classes."""
        classes = classes_of(model)
        count = _SMOKE_BATCH * batches
        found = read_digit_scenes(str(count), Problems())
        splits: dict[str, Sequence[Scene]] = {
            split: [replace(s, labels=s.labels % classes) for s in itertools.islice(scenes, count)]
            for split, scenes in found.splits.items()
        }
        small = settings.model_copy(
            update={
                "batch_size": min(settings.batch_size, _SMOKE_BATCH),
                "eval_batch_size": min(settings.eval_batch_size, _SMOKE_BATCH),
                "workers": 0,
                "limit": None,
            }
        )
        names = [str(label) for label in range(classes)]
        return splits_of(SceneSet(splits, names, found.digest), small)

    def locate(self, settings: DetectionDataSettings) -> None:
        """See the base class."""
        find_folder(settings.source, ("coco", "voc", "yolo"))

    def takes_source(self, source: str) -> bool:
        """See the base class."""
        return source.partition(":")[0] in SCENE_SOURCES

    def check_head(self, model: nn.Module, splits: Splits) -> None:
        """Make sure that ``model`` takes the images and has one score per class.

        Raises:
            ModelError: it is no known detector, fails on two images, or has other classes.
        """
        takes_list = is_list_detector(model)
        example = self.example_inputs(splits, 2)
        if not takes_list and isinstance(example.args[0], list):
            raise ModelError(
                f"{type(model).__name__} takes images of one size, and these differ",
                where="model",
                hint="set data.image_size",
            )
        expected, own = len(splits.classes), classes_of(model)
        if own != expected:
            wanted = expected + 1 if takes_list else expected
            raise ModelError(
                f"the model has {own} classes, but the data has {expected}",
                where="model",
                hint=f"num_classes={wanted}" + (" (with background)" if takes_list else ""),
            )
        self.probed(model, splits)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """The sum of the detector's own losses; see :func:`.detectors.detector_loss`."""
        if is_list_detector(model):
            with in_training(model):
                return detector_loss(model, batch)
        return detector_loss(model, batch)

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[Run]:
        """See the base class: outputs are decoded and suppressed, in pixels of the input."""
        device = device_of(model)
        with module_run(model), torch.no_grad():
            found = finder(model, self.suppression)
            yield lambda inputs: found(inputs.to(device))

    def scores(self, answers: Iterable[Answer]) -> Mapping[str, float]:
        """COCO's average precision, in percent: mean over IoU 0.50 … 0.95, at 0.50, at 0.75."""
        return self._precision(answers, None).metrics

    def _precision(
        self, answers: Iterable[Answer], classes: Sequence[str] | None
    ) -> AveragePrecision:
        pairs = list(_by_scene(answers))
        if classes is None:
            labels = [int(s.labels.max()) for s, _ in pairs if len(s.labels)]
            labels += [int(d.labels.max()) for _, d in pairs if len(d.labels)]
            classes = [str(label) for label in range(max(labels, default=0) + 1)]
        return average_precision(pairs, classes)

    def predictions(self, outputs: list[Detections], splits: Splits) -> list[Any]:
        """Objects of each image: ``[{"class", "score", "box": [x1, y1, x2, y2]}, …]``."""
        return [_objects(found, splits.classes, 0.0) for found in outputs]

    def drawings(
        self, answers: Mapping[str, Iterable[Answer]], splits: Splits
    ) -> Sequence[Drawing]:
        """Some images with the boxes of both variants, AP of each class, precision over recall."""
        held = {name: list(_by_scene(own)) for name, own in answers.items()}
        scored = {name: average_precision(pairs, splits.classes) for name, pairs in held.items()}
        first = next(iter(held.values()), [])
        rows = []
        for position, (scene, _) in enumerate(first[:_SHOWN_IMAGES]):
            shown = picture(_pixels(scene))
            truth = [
                {"box": box, "label": splits.classes[label]}
                for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)
            ]
            cells = [{"image": shown, "boxes": truth}]
            for pairs in held.values():
                objects = _objects(pairs[position][1], splits.classes, _SHOWN_SCORE)
                boxes = [
                    {"box": o["box"], "label": f"{o['class']} {100 * o['score']:.0f}"}
                    for o in objects
                ]
                cells.append({"image": shown, "boxes": boxes})
            rows.append(cells)
        names = list(held)
        per_class: list[list[str | float]] = [
            [label, *(scored[name].per_class[label] for name in names)]
            for label in splits.classes
            if all(label in scored[name].per_class for name in names)
        ]
        title = f"Objects found with a score of at least {_SHOWN_SCORE}"
        return [
            samples(title, ["annotated", *names], rows),
            table("mAP of each class, %", ["class", *names], per_class),
            lines(
                "Precision over recall at IoU 0.5, mean over the classes",
                "recall",
                "precision",
                {name: scored[name].curve for name in names},
            ),
        ]

    # ---- deployment

    def exported(self, model: nn.Module, splits: Splits) -> nn.Module:
        """Images → boxes and scores of all cells; suppression is left to whoever runs the file.

        Raises:
            ModelError: the detector decides on boxes inside of its forward.
        """
        return dense(model)

    def prepare(self, inputs: Inputs) -> Inputs:
        """A list of images of one size as one tensor.

        Raises:
            ModelError: their sizes differ.
        """
        images = inputs.args[0]
        if isinstance(images, Tensor):
            return inputs
        if len({image.shape for image in images}) > 1:
            raise ModelError(
                "a file takes images of one size, and these differ",
                where="model",
                hint="set data.image_size",
            )
        return Inputs((torch.stack(images),))

    def complete(self, outputs: dict[str, Tensor], inputs: Inputs) -> Any:
        """Non-maximum suppression of a file's boxes and scores."""
        return suppressed(outputs, self.prepare(inputs).args[0], self.suppression)

    def export_options(self, splits: Splits) -> Mapping[str, Any]:
        """Names of the outputs."""
        return {"output_names": ["boxes", "scores"]}

    def metadata(self, splits: Splits) -> dict[str, str]:
        """See the base class; ``slimkit.detection`` says how boxes are suppressed."""
        suppression = self.suppression
        settings = {"score": suppression.score, "iou": suppression.iou, "most": suppression.most}
        return model_metadata(
            self.type, splits.preprocessing, splits.classes, detection=json.dumps(settings)
        )


def _by_scene(answers: Iterable[Answer]) -> Iterable[tuple[Scene, Detections]]:
    """Detections in pixels of the scenes' own images."""
    for outputs, batch in answers:
        for found, target in zip(outputs, batch.targets, strict=True):
            boxes = target["placement"].to_image(found.boxes).cpu()
            yield target["scene"], Detections(boxes, found.scores.cpu(), found.labels.cpu())


def _objects(found: Detections, classes: Sequence[str], least: float) -> list[dict[str, Any]]:
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [
        {"class": classes[label], "score": score, "box": [round(side, 2) for side in box]}
        for label, score, box in rows
        if score >= least
    ]


def _pixels(scene: Scene) -> Tensor:
    """A scene's image for the report, uint8 (3, H, W)."""
    from slimkit.tasks.detection.samples import SceneSamples

    return SceneSamples([scene], None)[0].pixels
