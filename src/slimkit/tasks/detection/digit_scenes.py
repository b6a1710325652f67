"""Synthetic scenes made of real digits: data for tests and a first try, without any file.

Scikit-learn's 8×8 handwritten digits, enlarged to 14 to 40 pixels in random colours, two to six
on a canvas of 128×128 pixels with a colour gradient and noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from slimkit.artifact import content_hash
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet

__all__ = ["digit_scenes", "read_digit_scenes"]

SIZE = 128
"""Pixels a side."""

_COUNTS = {"train": 400, "val": 100, "test": 200}
"""Scenes per split: an epoch takes seconds, and 200 scenes hold about 800 digits to judge by."""

_SMALLEST, _LARGEST = 14, 40
"""Pixels a side of a digit: at strides 8 and 16 both ends have a level of their own."""

_OVERLAP = 0.2
"""Largest IoU of two digits in a scene."""

_VERSION = 1
"""Raise it when scenes come out otherwise."""


def read_digit_scenes(argument: str, problems: Problems) -> SceneSet:
    """Read ``digit-scenes`` or ``digit-scenes:N`` with N training scenes.

    The digits of each split are of other writers: no glyph is in two of them.
    """
    counts = dict(_COUNTS)
    if argument:
        from slimkit.errors import DataError

        if not argument.isdigit() or not 0 < int(argument) <= 100_000:
            raise DataError(
                f"expected a number of scenes 1 … 100000, got {argument!r}",
                where="data.source",
                hint="digit-scenes:400",
            )
        counts["train"] = int(argument)
    glyphs, labels = _glyphs()
    thirds = {"train": slice(0, 1000), "val": slice(1000, 1250), "test": slice(1250, None)}
    splits = {}
    for number, (split, count) in enumerate(counts.items()):
        part = thirds[split]
        splits[split] = digit_scenes(glyphs[part], labels[part], count, seed=number)
    digest = content_hash({"digit-scenes": _VERSION, **counts})
    return SceneSet(dict(splits), [str(digit) for digit in range(10)], digest, problems)


def digit_scenes(glyphs: Tensor, labels: Tensor, count: int, *, seed: int) -> list[Scene]:
    """Draw scenes.

    Args:
        glyphs: float (K, 8, 8) in 0 … 1.
        labels: int64 (K,).
        count: of scenes.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed * 7_919 + 13)
    return [_scene(glyphs, labels, number, generator) for number in range(count)]


def _glyphs() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images).float() / 16, torch.tensor(digits.target).long()


def _scene(glyphs: Tensor, labels: Tensor, number: int, generator: torch.Generator) -> Scene:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    ramp = torch.linspace(0, 1, SIZE)
    start, end = uniform(0, 0.6, 3, 1, 1), uniform(0, 0.6, 3, 1, 1)
    across = bool(torch.rand((), generator=generator) < 0.5)
    slope = ramp.view(1, 1, -1) if across else ramp.view(1, -1, 1)
    canvas = (start + (end - start) * slope).expand(3, SIZE, SIZE).clone()
    boxes: list[Tensor] = []
    found: list[int] = []
    wanted = int(torch.randint(2, 7, (), generator=generator))
    for _ in range(20 * wanted):
        if len(boxes) == wanted:
            break
        side = int(torch.randint(_SMALLEST, _LARGEST + 1, (), generator=generator))
        x, y = torch.randint(0, SIZE - side + 1, (2,), generator=generator).tolist()
        index = int(torch.randint(len(glyphs), (), generator=generator))
        glyph = F.interpolate(glyphs[index][None, None], size=(side, side), mode="bilinear")[0]
        ink = glyph[0] > 0.25
        rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
        box = torch.tensor(
            [x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]
        ).float()
        if boxes and float(box_iou(box[None], torch.stack(boxes)).max()) > _OVERLAP:
            continue
        colour = uniform(0.6, 1.0, 3, 1, 1)
        patch = canvas[:, y : y + side, x : x + side]
        canvas[:, y : y + side, x : x + side] = patch * (1 - glyph) + colour * glyph
        boxes.append(box)
        found.append(int(labels[index]))
    noise = 0.05 * torch.randn(3, SIZE, SIZE, generator=generator)
    pixels = ((canvas + noise).clamp(0, 1) * 255).round().byte()
    corners = torch.stack(boxes)
    sides = corners[:, 2:] - corners[:, :2]
    return Scene(
        pixels,
        (SIZE, SIZE),
        corners,
        torch.tensor(found),
        torch.zeros(len(found), dtype=torch.bool),
        sides.prod(1),
        number,
    )
