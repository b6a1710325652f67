"""``digit-masks``: synthetic images of real digits and their masks, without any file.

Scikit-learn's 8×8 handwritten digits, enlarged to 24 to 48 pixels in random colours, one to three
on a canvas of 96×96 pixels with a gradient and noise. Classes are the ground and ten digits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.artifact import content_hash
from slimkit.errors import DataError
from slimkit.tasks.segmentation.masks import VOID, Masked, MaskSet
from slimkit.tasks.segmentation.settings import SegmentationDataSettings

__all__ = ["digit_masks", "read_digit_masks"]

SIZE = 96
"""Pixels a side."""
_COUNTS = {"train": 300, "val": 60, "test": 100}
"""Images per split: an epoch takes seconds."""
_SMALLEST, _LARGEST = 24, 48
"""Pixels a side of a digit."""
_INK, _PAPER = 0.45, 0.2
"""Grey levels of a glyph: from the first on it is the digit, below the second the ground; what lies
between is void, as borders are in other data sets."""
_VERSION = 1
"""Raise it when images come out otherwise."""


def read_digit_masks(argument: str, settings: SegmentationDataSettings) -> MaskSet:  # noqa: ARG001
    """Read ``digit-masks`` or ``digit-masks:N`` with N training images.

    The digits of each split are of other writers: no glyph is in two of them.

    Raises:
        DataError: N is no number of 1 … 100,000.
    """
    from sklearn.datasets import load_digits

    counts = dict(_COUNTS)
    if argument:
        if not argument.isdigit() or not 0 < int(argument) <= 100_000:
            raise DataError(
                f"expected a number of images 1 … 100000, got {argument!r}",
                where="data.source",
                hint="digit-masks:300",
            )
        counts["train"] = int(argument)
    digits = load_digits()
    glyphs, labels = torch.tensor(digits.images).float() / 16, torch.tensor(digits.target).long()
    thirds = {"train": slice(0, 1000), "val": slice(1000, 1250), "test": slice(1250, None)}
    splits = {
        split: digit_masks(glyphs[thirds[split]], labels[thirds[split]], count, seed=number)
        for number, (split, count) in enumerate(counts.items())
    }
    classes = ["ground", *(str(digit) for digit in range(10))]
    return MaskSet(splits, classes, content_hash({"digit-masks": _VERSION, **counts}))


def digit_masks(glyphs: Tensor, labels: Tensor, count: int, *, seed: int) -> list[Masked]:
    """Draw images and masks.

    Args:
        glyphs: float (K, 8, 8) in 0 … 1.
        labels: int64 (K,), 0 … 9; in the mask one more.
        count: of images.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed * 7_919 + 17)
    return [_drawn(glyphs, labels, generator) for _ in range(count)]


def _drawn(glyphs: Tensor, labels: Tensor, generator: torch.Generator) -> Masked:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    ramp = torch.linspace(0, 1, SIZE).view(1, 1, -1)
    start, end = uniform(0, 0.5, 3, 1, 1), uniform(0, 0.5, 3, 1, 1)
    canvas = (start + (end - start) * ramp).expand(3, SIZE, SIZE).clone()
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        side = int(torch.randint(_SMALLEST, _LARGEST + 1, (), generator=generator))
        x, y = torch.randint(0, SIZE - side + 1, (2,), generator=generator).tolist()
        index = int(torch.randint(len(glyphs), (), generator=generator))
        glyph = F.interpolate(glyphs[index][None, None], size=(side, side), mode="bilinear")[0]
        place = (slice(y, y + side), slice(x, x + side))
        patch = canvas[:, place[0], place[1]]
        colour = uniform(0.6, 1.0, 3, 1, 1)
        canvas[:, place[0], place[1]] = patch * (1 - glyph) + colour * glyph
        own = mask[place]
        own[glyph[0] >= _PAPER] = VOID
        own[glyph[0] >= _INK] = int(labels[index]) + 1
    noise = 0.05 * torch.randn(3, SIZE, SIZE, generator=generator)
    return Masked(((canvas + noise).clamp(0, 1) * 255).round().byte(), mask)
