"""Image classification: loss, metrics and the checks between a model and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import DataError, InputError, ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks.class_evidence import AnswerRecord, class_evidence
from slimkit.tasks.data.loading import ImageSplits, load_data, synthetic_data
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import SOURCES, find_folder, takes_own
from slimkit.tasks.data.unlabelled import NO_LABEL
from slimkit.tasks.evidence import Evidence, Examination
from slimkit.tasks.interface import Answer, Metric, SettingsClass, Task
from slimkit.tasks.splits import Splits
from slimkit.train.settings import TrainSettings

__all__ = ["ClassificationTask"]

SMOKE_BATCH = 8


class ClassificationTask(Task):
    """One label per image.

    Attributes:
        label_smoothing: share of the target that is spread over all classes, 0 … 1 (Szegedy et
            al. 2016, section 7), in stages that say none of their own.
    """

    data_settings: ClassVar[SettingsClass] = DataSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "accuracy"),
        Metric("top5", "top-5 accuracy"),
        Metric("loss", "loss", unit="", higher_is_better=False, high=None),
    )

    script: ClassVar[str] = "slimkit.tasks.predict_images"

    type: Literal["classification"] = "classification"
    label_smoothing: float = Field(default=0, ge=0, lt=1)

    def load(self, settings: DataSettings) -> ImageSplits:
        """See the base class."""
        return load_data(settings)

    def synthetic(self, settings: DataSettings, model: nn.Module, *, batches: int) -> ImageSplits:
        """See the base class: random images, as many classes as ``model`` has outputs."""
        small = settings.model_copy(
            update={
                "batch_size": min(settings.batch_size, SMOKE_BATCH),
                "eval_batch_size": min(settings.eval_batch_size, SMOKE_BATCH),
            }
        )
        shape = synthetic_data(small, 2, batches=1).shape
        model.eval()
        with torch.no_grad():
            try:
                outputs = model(torch.zeros(1, *shape))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ModelError(
                    f"it cannot take images of shape {shape}: {error}", where="model"
                ) from error
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise ModelError("its output is not one row of logits per image", where="model")
        return synthetic_data(small, outputs.shape[1], batches=batches)

    def locate(self, settings: DataSettings) -> None:
        """See the base class."""
        find_folder(settings.source, ("parquet", "imagefolder", "images"))

    def takes_source(self, source: str) -> bool:
        """See the base class."""
        return source.partition(":")[0] in SOURCES or takes_own(source)

    def example_inputs(self, splits: Splits, count: int = 1) -> Inputs:
        """Images of zeros (count, C, H, W): shapes matter here, values do not."""
        if isinstance(splits, ImageSplits):
            return Inputs((torch.zeros(count, *splits.shape),))
        return super().example_inputs(splits, count)

    def check_head(self, model: nn.Module, splits: Splits) -> None:
        """Make sure that ``model`` takes the images and has one output per class.

        Raises:
            ModelError: it fails on a batch of two images, or the number of outputs differs.
        """
        outputs = logits(self.probed(model, splits))
        expected = len(splits.classes)
        if not expected:  # images without labels
            return
        if outputs.dim() != 2 or outputs.shape[1] != expected:
            raise ModelError(
                f"the model's output is {tuple(outputs.shape)} for 2 images, "
                f"but the data has {expected} classes",
                where="model",
                hint=f"num_classes={expected}",
            )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Cross-entropy of logits (N, classes) and labels (N,)."""
        outputs = batch.inputs.run(model)
        return self.loss_fn()(outputs, batch.targets), outputs

    def distillation(self, model: nn.Module) -> list[dict[str, Any]]:
        """Softened class scores (Hinton et al. 2015)."""
        return [{"type": "kd"}]

    def loss_fn(self) -> Callable[[Any, Tensor], Tensor]:
        """The same of outputs and labels."""

        def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
            _check_labelled(targets)
            return F.cross_entropy(
                logits(outputs).float(), targets, label_smoothing=self.label_smoothing
            )

        return cross_entropy

    def tuned(self, settings: TrainSettings) -> ClassificationTask:
        """See the base class: a stage's label smoothing, if it has one."""
        if not settings.label_smoothing:
            return self
        return self.model_copy(update={"label_smoothing": settings.label_smoothing})

    def scores(self, answers: Iterable[Answer]) -> dict[str, float]:
        """Accuracy and loss over all batches.

        Returns:
            ``accuracy`` and, from more than five classes on, ``top5``, in percent; ``loss``,
            the mean cross-entropy without label smoothing.
        """
        return _scores((logits(outputs).float(), batch.targets) for outputs, batch in answers)

    def examine(self, answers: Iterable[Answer], splits: Splits) -> Examination:
        """See the base class: label and answer of each image are kept."""
        record = AnswerRecord()

        def watched() -> Iterator[Answer]:
            for outputs, batch in answers:
                record.add(logits(outputs).float(), batch.targets)
                yield outputs, batch

        scores = self.scores(watched())
        return Examination(scores, record.to_json())

    def evidence(self, records: Mapping[str, Any], splits: Splits) -> Evidence:
        """See the base class: intervals, classes, confusions, images whose answer changed."""
        return class_evidence(records, splits)

    def predictions(self, outputs: Any, splits: Splits) -> list[Any]:
        """The three likeliest classes of each image: ``[{"class": name, "score": 0 … 1}, …]``."""
        rows = logits(outputs).float().softmax(1)
        names = splits.classes or [str(label) for label in range(rows.shape[1])]
        best = rows.topk(min(3, len(names)), dim=1)
        return [
            [
                {"class": names[label], "score": score}
                for score, label in zip(scores, labels, strict=True)
            ]
            for scores, labels in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def logits(outputs: Any) -> Tensor:
    """The logits in what a model returns: a tensor, an array, or the first of several.

    Raises:
        ModelError: there are none.
    """
    if isinstance(outputs, dict):  # Hugging Face's ModelOutput is one
        outputs = outputs.get("logits", next(iter(outputs.values()), None))
    elif isinstance(outputs, (tuple, list)) and outputs:
        outputs = outputs[0]
    elif hasattr(outputs, "logits"):
        outputs = outputs.logits
    if isinstance(outputs, Tensor):
        return outputs
    try:
        return torch.as_tensor(outputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"expected logits (N, classes), got {type(outputs).__name__}", where="model"
        ) from error


def _check_labelled(labels: Tensor) -> None:
    """Refuse images without labels; on another device the loss itself says so."""
    if labels.device.type == "cpu" and labels.numel() and int(labels.min()) == NO_LABEL:
        raise DataError(
            "these images have no labels to learn from or to judge by",
            where="data.source",
            hint="images: is for calibration; imagefolder:DIR has a folder per class",
        )


def _scores(batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    count, right, among_five, loss, classes = 0, 0.0, 0.0, 0.0, 0
    for outputs, labels in batches:
        _check_labelled(labels)
        count += len(labels)
        classes = outputs.shape[1]
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        if classes > 5:
            best = outputs.topk(5, dim=1).indices == labels[:, None]
            among_five += float(best.any(1).sum())
            right += float(best[:, 0].sum())
        else:
            right += float((outputs.argmax(1) == labels).sum())
    if not count:
        raise InputError("the loader yields no batch", where="loader")
    scores = {"accuracy": 100 * right / count, "loss": loss / count}
    return scores | {"top5": 100 * among_five / count} if classes > 5 else scores
