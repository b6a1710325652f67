"""Cells of one-stage detectors without anchors: where they are, and boxes from distances to them.

The distances of generalised focal loss (Li et al. 2020, section 3): a side lies at the mean of a
softmax over a few whole distances from the middle of the cell, in units of its stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Cells", "boxes_at", "cells_of", "distances_to", "mean_distances"]


@dataclass(frozen=True)
class Cells:
    """All cells of all levels, row by row, in the order of the levels.

    Attributes:
        centres: x and y in pixels of the input, float32 (A, 2).
        strides: pixels per cell, float32 (A,).
    """

    centres: Tensor
    strides: Tensor


def cells_of(
    image_size: tuple[int, int],
    strides: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    offset: float = 0.5,
) -> Cells:
    """The cells of an image.

    Args:
        image_size: height and width in pixels; a level has ``ceil(size / stride)`` cells a side.
        strides: of the levels.
        device: of the result.
        offset: of a centre inside its cell, in cells.
    """
    centres, sizes = [], []
    for stride in strides:
        rows, columns = (-(-side // stride) for side in image_size)
        y = (torch.arange(rows, device=device, dtype=torch.float32) + offset) * stride
        x = (torch.arange(columns, device=device, dtype=torch.float32) + offset) * stride
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
        centres.append(grid)
        sizes.append(torch.full((len(grid),), float(stride), device=device))
    return Cells(torch.cat(centres), torch.cat(sizes))


def mean_distances(logits: Tensor) -> Tensor:
    """Means of the distributions, in strides: (…, 4 · bins) → (…, 4)."""
    by_side = logits.reshape(*logits.shape[:-1], 4, -1).softmax(-1)
    bins = torch.arange(by_side.shape[-1], device=logits.device, dtype=by_side.dtype)
    means: Tensor = (by_side * bins).sum(-1)
    return means


def boxes_at(cells: Cells, distances: Tensor) -> Tensor:
    """Boxes from distances.

    Args:
        cells: A cells.
        distances: to the left, top, right and bottom side in strides, (…, A, 4).

    Returns:
        x1, y1, x2, y2 in pixels, (…, A, 4).
    """
    reach = distances * cells.strides[:, None]
    return torch.cat([cells.centres - reach[..., :2], cells.centres + reach[..., 2:]], dim=-1)


def distances_to(cells: Cells, boxes: Tensor, *, largest: float) -> Tensor:
    """The inverse of :func:`boxes_at`: distances of the sides of (A, 4) boxes, 0 … ``largest``."""
    before = cells.centres - boxes[:, :2]
    behind = boxes[:, 2:] - cells.centres
    distances = torch.cat([before, behind], dim=-1) / cells.strides[:, None]
    return distances.clamp(0, largest)
