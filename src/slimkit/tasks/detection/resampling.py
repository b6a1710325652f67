"""Bootstrap intervals of mAP: images drawn again, precision and recall recounted.

Which detection matches which object does not depend on the other images, so it is found out once
(greedily, as COCO's protocol does); a resample then only weighs the images anew. Two variants are
resampled with the same weights, so that the interval of their difference is a paired one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimkit.tasks.detection.scenes import Scene
from slimkit.tasks.detection.scoring import Detections

__all__ = ["matches", "resampled"]

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""Overlaps (IoU) at which COCO's protocol averages."""
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100
"""Detections per image and class that count, the best ones."""


def matches(pairs: Iterable[tuple[Scene, Detections]]) -> dict[str, Any]:
    """Which detections are right, in a form that is small as JSON.

    Args:
        pairs: scenes and what was found in them, in pixels of the scenes.

    Returns:
        ``images`` (how many) and per class (its number as text) ``objects``: the image of each
        object that counts; and of all detections, best first, ``image``, ``right`` and
        ``ignored``: bit ``t`` tells whether it matches an object, or a crowd, at the overlap
        :data:`THRESHOLDS` ``[t]``.
    """
    found: dict[int, list[tuple[float, int, int, int]]] = {}
    objects: dict[int, list[int]] = {}
    count = 0
    for image, (scene, detections) in enumerate(pairs):
        count += 1
        for label, crowd in zip(scene.labels.tolist(), scene.crowd.tolist(), strict=True):
            if not crowd:
                objects.setdefault(label, []).append(image)
        for label in sorted({*detections.labels.tolist()}):
            mine = detections.labels == label
            order = detections.scores[mine].argsort(descending=True, stable=True)[:_MOST]
            boxes, scores = detections.boxes[mine][order], detections.scores[mine][order]
            theirs = scene.labels == label
            right, ignored = _matched(boxes, scene.boxes[theirs], scene.crowd[theirs])
            rows = found.setdefault(label, [])
            rows += zip(scores.tolist(), [image] * len(boxes), right, ignored, strict=True)
    classes: dict[str, Any] = {}
    for label in sorted({*found, *objects}):
        best_first = sorted(found.get(label, ()), key=lambda row: -row[0])
        columns = [[row[place] for row in best_first] for place in (1, 2, 3)]
        classes[str(label)] = {
            "objects": objects.get(label, []),
            **dict(zip(("image", "right", "ignored"), columns, strict=True)),
        }
    return {"images": count, "classes": classes}


def _matched(boxes: Tensor, objects: Tensor, crowd: Tensor) -> tuple[list[int], list[int]]:
    """Bits per detection (best first): matches an object, or only a crowd, at each overlap."""
    right, ignored = [0] * len(boxes), [0] * len(boxes)
    if not len(boxes) or not len(objects):
        return right, ignored
    overlaps = _overlaps(boxes.double(), objects.double(), crowd).numpy()
    crowds = crowd.numpy()
    least = np.asarray(THRESHOLDS)
    bits = 1 << np.arange(len(least))
    taken = np.zeros((len(least), len(objects)), bool)
    for number in np.flatnonzero((overlaps >= least[0]).any(1)):
        row = overlaps[number]
        free = (row >= least[:, None] - 1e-10) & ~taken
        own = np.where(free & ~crowds, row, -1.0)
        best, hit = own.argmax(1), own.max(1) >= 0
        taken[np.flatnonzero(hit), best[hit]] = True
        right[number] = int(bits[hit].sum())
        ignored[number] = int(bits[~hit & (free & crowds).any(1)].sum())
    return right, ignored


def _overlaps(boxes: Tensor, objects: Tensor, crowd: Tensor) -> Tensor:
    """Intersection over union (D, G); over the detection's own area where the object is a crowd."""
    low = torch.maximum(boxes[:, None, :2], objects[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], objects[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(2)
    own, theirs = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, objects))
    union = own[:, None] + torch.where(crowd, 0.0, theirs[None] - shared)
    return shared / union.clamp_min(1e-12)


def resampled(
    records: Mapping[str, Mapping[str, Any]], *, resamples: int, seed: int = 0
) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Mean average precision of every variant on the same resamples of the images.

    Args:
        records: name → :func:`matches`, all on the same images.
        resamples: how many times images are drawn again, with replacement.
        seed: of the draws.

    Returns:
        Name → mAP in percent of every resample (resamples,), and of the images as they are.
    """
    images = next(iter(records.values()))["images"]
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(images, np.full(images, 1 / images), size=resamples)
    rows = np.concatenate([np.ones((1, images)), weights])
    found = {}
    for name, record in records.items():
        classes = [_Class(entry) for entry in record["classes"].values() if entry["objects"]]
        scores = np.asarray([_mean([c.precision(row) for c in classes]) for row in rows])
        found[name] = (100 * scores[1:], 100 * float(scores[0]))
    return found


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


class _Class:
    """The detections of one class, ready to be weighed."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.objects = np.asarray(entry["objects"], int)
        self.image = np.asarray(entry["image"], int)
        places = np.arange(len(THRESHOLDS))[:, None]
        self.right = (np.asarray(entry["right"], int) >> places) & 1
        ignored = (np.asarray(entry["ignored"], int) >> places) & 1
        self.wrong = 1 - self.right - ignored

    def precision(self, weights: NDArray[np.float64]) -> float | None:
        """Precision at 101 recalls, the mean over the overlaps; None without an object."""
        total = weights[self.objects].sum()
        if not total:
            return None
        if not len(self.image):
            return 0.0
        own = weights[self.image]
        right = (self.right * own).cumsum(1)
        wrong = (self.wrong * own).cumsum(1)
        precision = right / np.maximum(right + wrong, 1e-12)
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        held = 0.0
        for recall, height in zip(right / total, precision, strict=True):
            places = np.searchsorted(recall, _RECALLS - 1e-12)
            held += height[places[places < len(height)]].sum()
        return float(held / (len(THRESHOLDS) * len(_RECALLS)))
