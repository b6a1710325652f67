"""Semantic segmentation as a task: mean IoU, masks in the report and in predict.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks.data.sources import find_folder
from slimkit.tasks.drawing import Drawing, picture, samples, table
from slimkit.tasks.interface import Answer, Metric, SettingsClass, Task
from slimkit.tasks.segmentation.loading import MASK_SOURCES, load_masks, splits_of
from slimkit.tasks.segmentation.masks import VOID, Masked, MaskSet
from slimkit.tasks.segmentation.predict_masks import colours
from slimkit.tasks.segmentation.samples import pixels_of
from slimkit.tasks.segmentation.scoring import (
    confusion_of,
    intersection_over_union,
    segmentation_metrics,
)
from slimkit.tasks.segmentation.settings import SegmentationDataSettings
from slimkit.tasks.splits import Splits

__all__ = ["SegmentationTask", "logits_of"]

_SMOKE_BATCH = 2
_SHOWN_IMAGES = 4
"""Images in the report: enough for an impression, few enough for the page's size."""
_SEEN_THROUGH = 0.45
"""Part of the photograph in a picture with its mask."""


class SegmentationTask(Task):
    """A class for every pixel of an image.

    The model returns logits (N, classes, h, w), or a mapping with them under ``out``, as
    torchvision's segmenters do. Smaller logits are enlarged to the mask (bilinear).

    Attributes:
        aux_weight: of the loss of auxiliary logits (``aux``), which some segmenters have in
            training (Zhao et al. 2017, "PSPNet", section 3.3).
    """

    data_settings: ClassVar[SettingsClass] = SegmentationDataSettings
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("miou", "mIoU"),
        Metric("pixel_accuracy", "pixel accuracy"),
    )

    script: ClassVar[str] = "slimkit.tasks.segmentation.predict_masks"

    type: Literal["segmentation"] = "segmentation"
    aux_weight: float = Field(default=0.4, ge=0, le=10)

    def load(self, settings: SegmentationDataSettings) -> Splits:
        """See the base class."""
        return load_masks(settings)

    def synthetic(
        self, settings: SegmentationDataSettings, model: nn.Module, *, batches: int
    ) -> Splits:
        """See the base class: noise and random masks of the model's classes."""
        height, width = settings.size or (64, 64)
        example = torch.zeros(1, 3, height, width)
        model.eval()
        with torch.no_grad():
            classes = logits_of(Inputs((example,)).call(model)).shape[1]
        generator = torch.Generator().manual_seed(settings.seed)

        def drawn(count: int) -> list[Masked]:
            return [
                Masked(
                    torch.randint(0, 256, (3, height, width), generator=generator).byte(),
                    torch.randint(0, classes, (height, width), generator=generator).byte(),
                )
                for _ in range(count)
            ]

        splits = {
            "train": drawn(_SMOKE_BATCH * batches),
            "val": drawn(_SMOKE_BATCH),
            "test": drawn(_SMOKE_BATCH),
        }
        small = settings.model_copy(
            update={
                "batch_size": min(settings.batch_size, _SMOKE_BATCH),
                "eval_batch_size": min(settings.eval_batch_size, _SMOKE_BATCH),
                "workers": 0,
                "limit": None,
            }
        )
        names = [str(number) for number in range(classes)]
        return splits_of(MaskSet(splits, names, "synthetic"), small)

    def locate(self, settings: SegmentationDataSettings) -> None:
        """See the base class."""
        find_folder(settings.source, ("masks",))

    def takes_source(self, source: str) -> bool:
        """See the base class."""
        return source.partition(":")[0] in MASK_SOURCES

    def check_head(self, model: nn.Module, splits: Splits) -> None:
        """Make sure that ``model`` takes the images and has one logit per class and pixel.

        Raises:
            ModelError: it fails on two images, or its outputs do not fit the classes.
        """
        found = logits_of(self.probed(model, splits))
        expected = len(splits.classes)
        if found.shape[1] != expected:
            raise ModelError(
                f"the model has {found.shape[1]} classes, but the data has {expected}",
                where="model",
                hint=f"num_classes={expected}",
            )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """Mean cross-entropy over the pixels that are not void, and that of auxiliary logits."""
        outputs = batch.inputs.call(model)
        loss = _cross_entropy(logits_of(outputs), batch.targets)
        if isinstance(outputs, Mapping) and "aux" in outputs:
            loss = loss + self.aux_weight * _cross_entropy(outputs["aux"], batch.targets)
        return loss, outputs

    def scores(self, answers: Iterable[Answer]) -> Mapping[str, float]:
        """Mean IoU over the classes that occur, and the share of right pixels, in percent."""
        return segmentation_metrics(_confusion(answers))

    def predictions(self, outputs: Any, splits: Splits) -> list[Any]:
        """Share of each class in the pixels of an image: ``{"name": 0 … 1}``, none of zero."""
        found = []
        for labels in logits_of(outputs).argmax(1):
            counts = torch.bincount(labels.flatten().cpu(), minlength=len(splits.classes))
            shares = (counts / labels.numel()).tolist()
            found.append({n: s for n, s in zip(splits.classes, shares, strict=False) if s})
        return found

    def drawings(
        self, answers: Mapping[str, Iterable[Answer]], splits: Splits
    ) -> Sequence[Drawing]:
        """Some images with the masks of both variants, and the IoU of each class."""
        seen = {name: _Seen(own, splits) for name, own in answers.items()}
        first = next(iter(seen.values()))
        palette = torch.tensor(colours(len(splits.classes))).float() / 255
        rows = [
            [
                {"image": picture(_painted(photograph, mask, palette))}
                for mask in (first.truth[place], *(each.said[place] for each in seen.values()))
            ]
            for place, photograph in enumerate(first.photographs)
        ]
        names = list(answers)
        table_rows: list[list[str | float]] = [
            [label, *(_cell(each.per_class[place]) for each in seen.values())]
            for place, label in enumerate(splits.classes)
        ]
        return [
            samples("Masks", ["annotated", *names], rows),
            table("IoU of each class, %", ["class", *names], table_rows),
        ]

    # ---- deployment

    def exported(self, model: nn.Module, splits: Splits) -> nn.Module:
        """The module that returns the logits alone: auxiliary ones are for training."""
        return _LogitsOnly(model)

    def complete(self, outputs: dict[str, Tensor], inputs: Inputs) -> Any:
        """The file's logits."""
        return outputs["logits"]


class _Seen:
    """What a report shows of one variant's answers: the first masks, and the IoU of each class."""

    def __init__(self, answers: Iterable[Answer], splits: Splits) -> None:
        self.photographs: list[Tensor] = []
        self.truth: list[Tensor] = []
        self.said: list[Tensor] = []
        self._preprocessing = splits.preprocessing
        self.per_class = intersection_over_union(confusion_of(self._watched(answers)))

    def _watched(self, answers: Iterable[Answer]) -> Iterator[tuple[Tensor, Tensor]]:
        for outputs, batch in answers:
            logits = _enlarged(logits_of(outputs), batch.targets)
            missing = _SHOWN_IMAGES - len(self.said)
            if missing > 0:
                self.said += list(logits[:missing].argmax(1).cpu())
                self.truth += list(batch.targets[:missing].cpu())
                self.photographs += list(pixels_of(batch.inputs, self._preprocessing)[:missing])
            yield logits, batch.targets


def _cell(value: float | None) -> str | float:
    return "–" if value is None else value


class _LogitsOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (N, classes, h, w)."""
        return {"logits": logits_of(self.model(images))}


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a segmenter returns: a tensor, or ``out`` of a mapping.

    Raises:
        ModelError: there are none.
    """
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("out", outputs.get("logits"))
    elif isinstance(outputs, tuple | list) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise ModelError(
            f"expected logits (N, classes, H, W), or a mapping with them under out, got "
            f"{type(outputs).__name__}",
            where="model",
        )
    return found


def _enlarged(logits: Tensor, masks: Tensor) -> Tensor:
    logits = logits.float()
    if logits.shape[-2:] == masks.shape[-2:]:
        return logits
    return F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Over the pixels that are not void; 0 of a batch without any."""
    logits = _enlarged(logits, masks)
    known = (masks != VOID).sum().clamp(min=1)
    return F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum") / known


def _confusion(answers: Iterable[Answer]) -> Tensor:
    return confusion_of((logits_of(outputs), batch.targets) for outputs, batch in answers)


def _painted(photograph: Tensor, mask: Tensor, palette: Tensor) -> Tensor:
    """The photograph seen through its mask; void is left as it is."""
    known = mask != VOID
    painted = palette[mask.where(known, torch.zeros_like(mask)).long()].permute(2, 0, 1)
    mixed = _SEEN_THROUGH * photograph + (1 - _SEEN_THROUGH) * painted
    return torch.where(known, mixed, photograph)
