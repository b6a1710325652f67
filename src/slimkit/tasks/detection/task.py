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
    distillation_losses,
    finder,
    is_list_detector,
    suppressed,
)
from slimkit.tasks.detection.digit_scenes import read_digit_scenes
from slimkit.tasks.detection.evidence import detection_evidence, detection_record, objects_of
from slimkit.tasks.detection.loading import SCENE_SOURCES, load_scenes, splits_of
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet
from slimkit.tasks.detection.scoring import Detections, average_precision, require_evaluator
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.evidence import Evidence, Examination
from slimkit.tasks.interface import Answer, Metric, SettingsClass, Task
from slimkit.tasks.prediction import model_metadata
from slimkit.tasks.running import Run, device_of, in_training, module_run
from slimkit.tasks.splits import Splits

__all__ = ["DetectionTask"]

_SMOKE_BATCH = 2


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

    def distillation(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Features, scores and boxes; see :func:`.detectors.distillation_losses`."""
        return distillation_losses(model)

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[Run]:
        """See the base class: outputs are decoded and suppressed, in pixels of the input."""
        device = device_of(model)
        with module_run(model), torch.no_grad():
            found = finder(model, self.suppression)
            yield lambda inputs: found(inputs.to(device))

    def scores(self, answers: Iterable[Answer]) -> Mapping[str, float]:
        """COCO's average precision, in percent: mean over IoU 0.50 … 0.95, at 0.50, at 0.75."""
        pairs = list(_by_scene(answers))
        labels = [int(s.labels.max()) for s, _ in pairs if len(s.labels)]
        labels += [int(d.labels.max()) for _, d in pairs if len(d.labels)]
        classes = [str(label) for label in range(max(labels, default=0) + 1)]
        return average_precision(pairs, classes).metrics

    def predictions(self, outputs: list[Detections], splits: Splits) -> list[Any]:
        """Objects of each image: ``[{"class", "score", "box": [x1, y1, x2, y2]}, …]``."""
        return [objects_of(found, splits.classes) for found in outputs]

    def examine(self, answers: Iterable[Answer], splits: Splits) -> Examination:
        """See the base class: which detections are right is kept, and boxes of the first images."""
        pairs = list(_by_scene(answers))
        scored = average_precision(pairs, splits.classes)
        return Examination(scored.metrics, detection_record(pairs, scored, splits.classes))

    def evidence(self, records: Mapping[str, Any], splits: Splits) -> Evidence:
        """See the base class: intervals, boxes side by side, AP of each class, defects."""
        return detection_evidence(records, splits)

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
