"""Average precision by COCO's protocol, computed by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import MissingDependencyError
from slimkit.tasks.detection.scenes import Scene

__all__ = ["AveragePrecision", "Detections", "average_precision", "require_evaluator"]


@dataclass(frozen=True)
class Detections:
    """Boxes found in one image, best first.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the image, (D, 4).
        scores: 0 … 1, (D,).
        labels: int64 (D,).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's summary, in percent.

    Attributes:
        metrics: ``map`` (mean over IoU 0.50 … 0.95), ``map50``, ``map75``, and ``map_small``,
            ``map_medium``, ``map_large`` for objects below 32², up to 96², above; sizes that no
            object has are left out.
        per_class: class → mAP, in the order of the classes; those without objects are left out.
        curve: precision over recall at IoU 0.5, mean over classes: (recall, precision) in 0 … 1.
    """

    metrics: dict[str, float]
    per_class: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)


_STATS = ("map", "map50", "map75", "map_small", "map_medium", "map_large")


def require_evaluator() -> None:
    """Make sure that faster-coco-eval is there, before hours of training.

    Raises:
        MissingDependencyError: it is not.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "faster-coco-eval, which computes average precision, is not installed",
            where="task",
            hint="pip install 'slimkit[detection]'",
        ) from error


def average_precision(
    found: Iterable[tuple[Scene, Detections]], classes: Sequence[str]
) -> AveragePrecision:
    """Score detections against what is in the scenes.

    Args:
        found: scenes, each with what was detected in it, in the image's own pixels.
        classes: names in the order of the labels.

    Raises:
        MissingDependencyError: faster-coco-eval is not installed.
    """
    require_evaluator()
    from faster_coco_eval import COCO, COCOeval_faster

    truth: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes)],
    }
    results: list[dict[str, Any]] = []
    for number, (scene, detections) in enumerate(found):
        truth["images"].append({"id": number, "height": scene.size[0], "width": scene.size[1]})
        truth["annotations"] += _annotations(scene, number, len(truth["annotations"]))
        results += _results(detections, number)
    if not truth["annotations"] or not results:
        return AveragePrecision({"map": 0.0, "map50": 0.0, "map75": 0.0})
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(truth)
        evaluation = COCOeval_faster(known, known.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {
        name: 100 * float(value)
        for name, value in zip(_STATS, evaluation.stats[: len(_STATS)], strict=True)
        if value >= 0
    }
    precision = np.asarray(evaluation.eval["precision"])  # IoU, recall, class, area, detections
    return AveragePrecision(metrics, _per_class(precision, classes), _curve(precision))


def _per_class(precision: Any, classes: Sequence[str]) -> dict[str, float]:
    values = {}
    for number, name in enumerate(classes):
        own = precision[:, :, number, 0, -1]
        if (own > -1).any():
            values[name] = 100 * float(own[own > -1].mean())
    return values


def _curve(precision: Any) -> list[tuple[float, float]]:
    at_half = precision[0, :, :, 0, -1]
    present = (at_half > -1).any(0)
    if not present.any():
        return []
    mean = at_half[:, present].mean(1)
    recall = np.linspace(0, 1, len(mean))
    return [(float(x), float(y)) for x, y in zip(recall, mean, strict=True)]


def _annotations(scene: Scene, number: int, first: int) -> list[dict[str, Any]]:
    rows: Iterable[Any] = zip(
        _corner_and_size(scene.boxes), scene.labels.tolist(), scene.crowd.tolist(),
        scene.area.tolist(), strict=True,
    )  # fmt: skip
    return [
        {
            "id": first + index + 1,
            "image_id": number,
            "category_id": label,
            "bbox": box,
            "area": area,
            "iscrowd": int(crowd),
        }
        for index, (box, label, crowd, area) in enumerate(rows)
    ]


def _results(detections: Detections, number: int) -> list[dict[str, Any]]:
    rows = zip(
        _corner_and_size(detections.boxes), detections.scores.tolist(),
        detections.labels.tolist(), strict=True,
    )  # fmt: skip
    return [
        {"image_id": number, "category_id": label, "bbox": box, "score": score}
        for box, score, label in rows
    ]


def _corner_and_size(boxes: Tensor) -> list[list[float]]:
    corners = boxes.double()
    rows: list[list[float]] = torch.cat(
        [corners[:, :2], corners[:, 2:] - corners[:, :2]], 1
    ).tolist()
    return rows
