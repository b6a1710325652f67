"""Scenes: images with boxes, checked as they are read, with what was wrong with them counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from slimkit.errors import DataError

__all__ = ["Problems", "Scene", "SceneSet", "checked_boxes"]

OnBad = Literal["error", "skip"]
_EDGE = 1.0
"""Pixels that a side may lie outside of its image: annotation tools round, and count from 1."""


@dataclass(frozen=True)
class Scene:
    """One image and what is in it.

    Attributes:
        image: the file, or uint8 pixels (3, H, W).
        size: height and width in pixels.
        boxes: x1, y1, x2, y2 in pixels of the image, float32 (G, 4); G may be 0.
        labels: int64 (G,), 0 … classes − 1.
        crowd: bool (G,); boxes around many objects, which evaluation ignores and training too.
        area: of the objects (their masks, where an annotation knows them) in pixels, (G,).
        number: of the image in its source.
    """

    image: Path | Tensor
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    number: int

    @property
    def name(self) -> str:
        """The file's name, or the number of a scene without one."""
        return self.image.name if isinstance(self.image, Path) else f"scene {self.number}"


@dataclass
class Problems:
    """What was wrong with annotations: left out and counted, or an error.

    Attributes:
        on_bad: ``"skip"`` counts, ``"error"`` raises at the first.
        counts: kind of problem → how often.
        first: kind of problem → where it was met first.
    """

    on_bad: OnBad = "skip"
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, where: str) -> None:
        """Count a problem.

        Raises:
            DataError: problems are errors.
        """
        if self.on_bad == "error":
            raise DataError(
                kind, where=where, hint="on_bad_annotation: skip leaves it out and counts it"
            )
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, where)

    def facts(self) -> dict[str, dict[str, int | str]]:
        """For the report: kind → ``{"count": how often, "first": where}``."""
        return {
            kind: {"count": count, "first": self.first[kind]} for kind, count in self.counts.items()
        }


@dataclass(frozen=True)
class SceneSet:
    """What a source has.

    Attributes:
        splits: ``"train"``, ``"val"``, ``"test"`` → scenes; those that exist.
        classes: names in the order of the labels.
        digest: SHA-256 (hex) of the content.
        problems: met while reading.
    """

    splits: dict[str, Sequence[Scene]]
    classes: list[str]
    digest: str
    problems: Problems = field(default_factory=Problems)


def checked_boxes(
    rows: Iterable[tuple[Sequence[float], int, bool, float | None]],
    size: tuple[int, int],
    problems: Problems,
    where: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes inside their image.

    A box that reaches over an edge is cut there, one that is wholly outside, empty or not a
    number is left out; all are counted.

    Args:
        rows: per object x1, y1, x2, y2 in pixels; label; crowd; area, or None for the box's.
        size: height and width of the image.
        problems: counts them.
        where: what an error names.

    Returns:
        Boxes (G, 4), labels (G,), crowd (G,) and areas (G,).
    """
    height, width = size
    kept: list[tuple[list[float], int, bool, float]] = []
    for corners, label, crowd, area in rows:
        x1, y1, x2, y2 = (float(value) for value in corners)
        if not all(abs(value) < 1e9 for value in (x1, y1, x2, y2)):  # also false for NaN
            problems.note("a box that is not a number", where)
            continue
        if x2 <= x1 or y2 <= y1:
            problems.note("a box of zero size", where)
            continue
        inner = [max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)]
        if inner[2] <= inner[0] or inner[3] <= inner[1]:
            problems.note("a box outside of its image", where)
            continue
        reach = max(abs(a - b) for a, b in zip(inner, (x1, y1, x2, y2), strict=True))
        if reach > _EDGE:
            problems.note("a box that reaches over its image, cut at the edge", where)
        own = (inner[2] - inner[0]) * (inner[3] - inner[1])
        kept.append((inner, label, crowd, own if area is None or not area > 0 else float(area)))
    boxes = torch.tensor([row[0] for row in kept], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([row[1] for row in kept], dtype=torch.int64)
    crowds = torch.tensor([row[2] for row in kept], dtype=torch.bool)
    areas = torch.tensor([row[3] for row in kept], dtype=torch.float32)
    return boxes, labels, crowds, areas
