"""Random changes of whole batches: a few tensor operations, no loop over images.

All randomness of an epoch is drawn before it, from one generator, so that an image's change
depends on (seed, epoch, position) and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.tasks.data.settings import AugmentSettings

__all__ = ["Draws", "augment", "draw"]


@dataclass(frozen=True)
class Draws:
    """What was drawn for each image of an epoch; every tensor has length N or is absent.

    Attributes:
        top, left: where the crop starts in the padded image, 0 … 2·crop pixels.
        flip: whether to mirror.
        box: (N, 4) centre x, y and half width, height of the enlarged part in [-1, 1] units.
        hole: (N, 2) centre of the cutout as a fraction of height and width.
    """

    top: Tensor | None = None
    left: Tensor | None = None
    flip: Tensor | None = None
    box: Tensor | None = None
    hole: Tensor | None = None

    def at(self, positions: Tensor) -> Draws:
        """The draws of some images only."""
        fields = (self.top, self.left, self.flip, self.box, self.hole)
        return Draws(*(None if f is None else f[positions] for f in fields))


def draw(settings: AugmentSettings, count: int, generator: torch.Generator) -> Draws:
    """Draw the changes of ``count`` images."""
    top = left = flip = box = hole = None
    if settings.crop:
        top, left = torch.randint(0, 2 * settings.crop + 1, (2, count), generator=generator)
    if settings.flip:
        flip = torch.rand(count, generator=generator) < 0.5
    if settings.scale is not None:
        uniform = torch.rand(4, count, generator=generator)
        area = settings.scale + (1 - settings.scale) * uniform[0]
        ratio = torch.exp((2 * uniform[1] - 1) * math.log(4 / 3))
        half = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), 1).clamp_(max=1)
        box = torch.cat(((2 * uniform[2:].T - 1) * (1 - half), half), 1)
    if settings.cutout:
        hole = torch.rand(count, 2, generator=generator)
    return Draws(top, left, flip, box, hole)


def augment(images: Tensor, settings: AugmentSettings, draws: Draws) -> Tensor:
    """Change a batch.

    Args:
        images: uint8 (B, H, W, C).
        settings: what may change.
        draws: what was drawn for these B images.

    Returns:
        uint8 (B, H, W, C).
    """
    if draws.box is not None:
        images = _enlarge(images, draws.box)
    if draws.top is not None or draws.flip is not None:
        images = _crop_and_flip(images, settings.crop, draws)
    if draws.hole is not None:
        images = _cut_out(images, settings.cutout, draws.hole)
    return images


def _crop_and_flip(images: Tensor, pad: int, draws: Draws) -> Tensor:
    """One gather does both: row and column indices into the padded batch."""
    count, height, width, channels = images.shape
    if pad:
        images = F.pad(images, (0, 0, pad, pad, pad, pad))
    rows = torch.arange(height).expand(count, height)
    columns = torch.arange(width).expand(count, width)
    if draws.flip is not None:
        columns = torch.where(draws.flip[:, None], width - 1 - columns, columns)
    if draws.top is not None and draws.left is not None:
        rows = rows + draws.top[:, None]
        columns = columns + draws.left[:, None]
    padded_height, padded_width = height + 2 * pad, width + 2 * pad
    first = torch.arange(count)[:, None] * padded_height
    pixels = ((first + rows)[:, :, None] * padded_width + columns[:, None, :]).reshape(-1)
    flat = images.reshape(count * padded_height * padded_width, channels)
    return flat.index_select(0, pixels).view(count, height, width, channels)


def _enlarge(images: Tensor, box: Tensor) -> Tensor:
    """Bilinear samples of the boxes at the full size."""
    count, height, width, _ = images.shape
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = box[:, 2], box[:, 3]
    theta[:, :, 2] = box[:, :2]
    planes = images.permute(0, 3, 1, 2).to(torch.float32)
    grid = F.affine_grid(theta, [count, 1, height, width], align_corners=False)
    sampled = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _cut_out(images: Tensor, size: int, hole: Tensor) -> Tensor:
    _, height, width, _ = images.shape
    centre = (hole * torch.tensor([height, width])).long()
    rows = (torch.arange(height) - centre[:, :1] + size // 2).unsqueeze(2)
    columns = (torch.arange(width) - centre[:, 1:] + size // 2).unsqueeze(1)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    return images.masked_fill(inside.unsqueeze(3), 0)
