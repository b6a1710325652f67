"""PicoHead: class scores and distance distributions of every cell, one branch per level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimkit.models.picodet.blocks import DepthwiseSeparable

__all__ = ["CellPredictions", "PicoHead"]

_PRIOR = 0.01
"""Probability of every class before training (Lin et al. 2017, "Focal Loss", section 4.1)."""


class CellPredictions(NamedTuple):
    """What a detector says about every cell of every level, coarser levels last.

    Attributes:
        logits: class scores before the sigmoid, (N, cells, classes).
        distances: for the four sides left, top, right, bottom the logits of ``bins`` distances
            0 … bins − 1 in units of the level's stride, (N, cells, 4 · bins).
    """

    logits: Tensor
    distances: Tensor


class PicoHead(nn.Module):
    """Depthwise separable convolutions, then one 1×1 for scores and distances together.

    Args:
        channels: of every level.
        levels: number of them; each has weights of its own.
        num_classes: scores per cell.
        layers: depthwise separable convolutions per level.
        bins: distances per side (``reg_max + 1`` of generalised focal loss).
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, layers: int, bins: int = 8
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.towers = nn.ModuleList(
            nn.Sequential(*(DepthwiseSeparable(channels, channels) for _ in range(layers)))
            for _ in range(levels)
        )
        self.outputs = nn.ModuleList(
            nn.Conv2d(channels, num_classes + 4 * bins, 1) for _ in range(levels)
        )

    def initialise(self) -> None:
        """Small weights, and a bias that makes every class improbable."""
        for output in self.outputs:
            assert isinstance(output, nn.Conv2d) and output.bias is not None  # noqa: PT018
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)
            with torch.no_grad():
                output.bias[: self.num_classes] = -math.log((1 - _PRIOR) / _PRIOR)

    def forward(self, features: Sequence[Tensor]) -> CellPredictions:
        """Features of every level (N, channels, H, W) → predictions of all cells."""
        logits, distances = [], []
        for tower, output, x in zip(self.towers, self.outputs, features, strict=True):
            cells = output(tower(x)).flatten(2).transpose(1, 2)
            logits.append(cells[..., : self.num_classes])
            distances.append(cells[..., self.num_classes :])
        return CellPredictions(torch.cat(logits, dim=1), torch.cat(distances, dim=1))
