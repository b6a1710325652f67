"""Intersection over union (the Jaccard index) of every class, from one confusion matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.errors import InputError, ModelError
from slimkit.tasks.segmentation.masks import VOID

__all__ = ["confusion_of", "intersection_over_union", "segmentation_metrics"]


def confusion_of(answers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Counts of pixels, int64 (classes, classes): rows are the truth, columns what was said.

    Args:
        answers: logits (N, classes, h, w) and masks (N, H, W); logits of another size are
            enlarged (bilinear). Void pixels are not counted.

    Raises:
        InputError: there is no batch.
        ModelError: a mask has a class that the logits do not have.
    """
    total: Tensor | None = None
    for logits, masks in answers:
        classes, size = logits.shape[1], masks.shape[-2:]
        whole = logits
        if logits.shape[-2:] != size:
            whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        said = whole.argmax(1)
        known = masks != VOID
        truth, said = masks[known].to(said.device), said[known]
        if truth.numel() and int(truth.max()) >= classes:
            raise ModelError(
                f"a mask has class {int(truth.max())}, the model {classes} classes", where="model"
            )
        counts = torch.bincount(truth * classes + said, minlength=classes * classes)
        counts = counts.view(classes, classes).cpu()
        total = counts if total is None else total + counts
    if total is None:
        raise InputError("the loader yields no batch", where="loader")
    return total


def intersection_over_union(confusion: Tensor) -> list[float | None]:
    """IoU of each class in percent; None of a class that is neither there nor ever said."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0).double() + confusion.sum(1).double() - hit
    return [100 * float(h) / float(u) if u else None for h, u in zip(hit, union, strict=True)]


def segmentation_metrics(confusion: Tensor) -> dict[str, float]:
    """``miou``: the mean of the classes' IoU; ``pixel_accuracy``: both in percent."""
    found = [value for value in intersection_over_union(confusion) if value is not None]
    total = int(confusion.sum())
    return {
        "miou": sum(found) / len(found) if found else 0.0,
        "pixel_accuracy": 100 * float(confusion.diagonal().sum()) / total if total else 0.0,
    }
