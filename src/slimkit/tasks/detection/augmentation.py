"""Random changes of images together with their boxes: cut, flip, colour, mosaic, mixup."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from slimkit.tasks.detection.samples import PAD, Sample, SceneSamples, place
from slimkit.tasks.detection.settings import BoxAugmentSettings

__all__ = ["Augment"]

_MOSAIC_CENTRE = (0.3, 0.7)
"""Where the four images of a mosaic meet, as a share of the input: none becomes a sliver."""

_SMALLEST = 2.0
"""Pixels that a side of a box must keep, so that a loss has something to divide by."""


@dataclass(frozen=True)
class Augment:
    """``augment(sample, generator)`` → the sample changed, in the input's size.

    Attributes:
        settings: how.
        samples: whole images, for mosaic and mixup.
        size: height and width of the input; None keeps the size that comes.
        letterbox: keep the aspect ratio and pad.
    """

    settings: BoxAugmentSettings
    samples: SceneSamples
    size: tuple[int, int] | None
    letterbox: bool = False

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """A whole sample, changed at random, in the input's size."""
        draws = _Draws(generator)
        if self.size is not None and draws.happens(self.settings.mosaic):
            sample = self._mosaic(sample, draws)
        else:
            sample = self._changed(sample, draws)
        if self.size is not None and draws.happens(self.settings.mixup):
            sample = _blended(sample, self._changed(self._another(draws), draws))
        return replace(_coloured(sample, self.settings.colour, draws), placement=None)

    def _another(self, draws: _Draws) -> Sample:
        return self.samples[draws.below(len(self.samples))]

    def _changed(
        self, sample: Sample, draws: _Draws, size: tuple[int, int] | None = None
    ) -> Sample:
        """Cut, flipped, and in the input's size (or another one)."""
        settings = self.settings
        if settings.scale is not None:
            sample = _cut(sample, self._region(sample, draws), settings.min_visible)
        if draws.happens(settings.flip):
            sample = _flipped(sample, 0)
        if draws.happens(settings.vertical_flip):
            sample = _flipped(sample, 1)
        wanted = size or self.size
        if wanted is None:
            return sample
        return place(sample, wanted, letterbox=self.letterbox and size is None)

    def _region(self, sample: Sample, draws: _Draws) -> tuple[int, int, int, int]:
        """x, y, width and height of a part of the image, which may reach over it."""
        height, width = sample.pixels.shape[1:]
        low, high = self.settings.scale or (1.0, 1.0)
        scale = draws.between(low, high)
        bend = math.exp(draws.between(-1, 1) * math.log(self.settings.aspect))
        part = max(8, round(width * scale * bend)), max(8, round(height * scale / bend))
        x, y = (
            round(draws.between(min(0, whole - own), max(0, whole - own)))
            for whole, own in zip((width, height), part, strict=True)
        )
        return x, y, *part

    def _mosaic(self, sample: Sample, draws: _Draws) -> Sample:
        assert self.size is not None
        height, width = self.size
        x = round(width * draws.between(*_MOSAIC_CENTRE))
        y = round(height * draws.between(*_MOSAIC_CENTRE))
        canvas = torch.full((3, height, width), PAD, dtype=torch.uint8)
        boxes, labels = [], []
        others = [sample, *(self._another(draws) for _ in range(3))]
        corners = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
        for other, (x1, y1, x2, y2) in zip(others, corners, strict=True):
            tile = self._changed(other, draws, (y2 - y1, x2 - x1))
            canvas[:, y1:y2, x1:x2] = tile.pixels
            boxes.append(tile.boxes + tile.boxes.new_tensor([x1, y1, x1, y1]))
            labels.append(tile.labels)
        return replace(
            sample, pixels=canvas, boxes=torch.cat(boxes), labels=torch.cat(labels), placement=None
        )


class _Draws:
    """Random numbers of one sample."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self._generator))

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))

    def happens(self, share: float) -> bool:
        return share > 0 and self.between(0, 1) < share


def _cut(sample: Sample, region: tuple[int, int, int, int], min_visible: float) -> Sample:
    """A part of the image, grey where it reaches over the edge."""
    x, y, width, height = region
    rows, columns = sample.pixels.shape[1:]
    # in memory pixel by pixel, as Pillow reads it when it is resized
    canvas = torch.full((height, width, 3), PAD, dtype=torch.uint8).permute(2, 0, 1)
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, columns), min(y + height, rows)
    if right > left and bottom > top:
        part = sample.pixels[:, top:bottom, left:right]
        canvas[:, top - y : bottom - y, left - x : right - x] = part
    moved = sample.boxes - sample.boxes.new_tensor([x, y, x, y])
    limits = moved.new_tensor([width, height, width, height])
    inner = torch.minimum(moved.clamp(min=0), limits)
    kept = _visible(inner, moved, min_visible)
    return replace(
        sample, pixels=canvas, boxes=inner[kept], labels=sample.labels[kept], placement=None
    )


def _visible(inner: Tensor, whole: Tensor, least: float) -> Tensor:
    sides = inner[:, 2:] - inner[:, :2]
    before = (whole[:, 2:] - whole[:, :2]).prod(1).clamp(min=1e-6)
    return (sides.prod(1) / before >= least) & (sides >= _SMALLEST).all(1)


def _flipped(sample: Sample, axis: int) -> Sample:
    """Mirrored left to right (axis 0) or top to bottom (axis 1)."""
    extent = sample.pixels.shape[2 - axis]
    boxes = sample.boxes.clone()
    boxes[:, axis], boxes[:, axis + 2] = (
        extent - sample.boxes[:, axis + 2],
        extent - sample.boxes[:, axis],
    )
    return replace(sample, pixels=sample.pixels.flip(2 - axis), boxes=boxes, placement=None)


def _coloured(sample: Sample, strength: float, draws: _Draws) -> Sample:
    if not strength:
        return sample
    pixels = transforms.adjust_brightness(sample.pixels, draws.between(1 - strength, 1 + strength))
    pixels = transforms.adjust_contrast(pixels, draws.between(1 - strength, 1 + strength))
    pixels = transforms.adjust_saturation(pixels, draws.between(1 - strength, 1 + strength))
    if draws.happens(0.5):  # the only slow one
        pixels = transforms.adjust_hue(pixels, draws.between(-0.1, 0.1) * strength)
    return replace(sample, pixels=pixels)


def _blended(first: Sample, second: Sample) -> Sample:
    """The mean of two images, boxes of both."""
    pixels = ((first.pixels.float() + second.pixels.float()) / 2).round().byte()
    return replace(
        first,
        pixels=pixels,
        boxes=torch.cat([first.boxes, second.boxes]),
        labels=torch.cat([first.labels, second.labels]),
    )
