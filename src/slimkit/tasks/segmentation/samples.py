"""From files to batches: pixels and masks decoded, changed together, brought to one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from slimkit.errors import DataError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks.data.stores import free_memory
from slimkit.tasks.segmentation.masks import VOID, Masked, decoded_image, decoded_mask
from slimkit.tasks.segmentation.settings import MaskAugmentSettings

__all__ = ["Augment", "Collate", "MaskSamples", "Sample", "resized"]


@dataclass(frozen=True)
class Sample:
    """Pixels and mask on their way into a batch.

    Attributes:
        pixels: uint8 (3, H, W).
        mask: uint8 (H, W), numbers of classes and void.
    """

    pixels: Tensor
    mask: Tensor


class MaskSamples:
    """Images by number as samples; decoded ones are kept while memory is free for all of them.

    Args:
        items: what there is.
        size: height and width of the input; None keeps the image's own.
        void: value in files that belongs to no class.
        whole: give samples in the image's own size, for what changes them at random first.
    """

    def __init__(
        self,
        items: Sequence[Masked],
        size: tuple[int, int] | None,
        *,
        void: int | None = None,
        whole: bool = False,
    ) -> None:
        self.items, self.size, self.void, self.whole = items, size, void, whole
        self._held: dict[int, Sample] = {}
        self._keep: bool | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Sample:
        held = self._held.get(number)
        if held is None:
            item = self.items[number]
            held = Sample(decoded_image(item.image), decoded_mask(item.mask, self.void))
            if self.size is not None and not self.whole:
                held = resized(held, self.size)
            if self._keep is None:
                needed = len(self.items) * (held.pixels.numel() + held.mask.numel())
                self._keep = needed < free_memory() / 4
            if self._keep:
                self._held[number] = held
        return held


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """Pixels by Pillow's bilinear filter, as ``predict.py`` does; masks by the nearest pixel."""
    from PIL import Image

    if tuple(sample.mask.shape) == size:
        return sample
    wide = (size[1], size[0])
    image = Image.fromarray(sample.pixels.permute(1, 2, 0).numpy())
    mask = Image.fromarray(sample.mask.numpy())
    pixels = np.asarray(image.resize(wide, Image.Resampling.BILINEAR)).copy()
    labels = np.asarray(mask.resize(wide, Image.Resampling.NEAREST)).copy()
    return Sample(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(labels))


@dataclass(frozen=True)
class Augment:
    """``augment(sample, generator)`` → pixels and mask changed alike, in the input's size.

    Attributes:
        settings: how.
        size: height and width of the input; None keeps the size that comes.
    """

    settings: MaskAugmentSettings
    size: tuple[int, int] | None

    def __call__(self, sample: Sample, generator: torch.Generator) -> Sample:
        """A whole sample, changed at random."""

        def draw(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        height, width = self.size or (int(sample.mask.shape[0]), int(sample.mask.shape[1]))
        factor = draw(*self.settings.scale) if self.settings.scale is not None else 1.0
        scaled = (max(1, round(height * factor)), max(1, round(width * factor)))
        sample = _cut(resized(sample, scaled), (height, width), draw(0, 1), draw(0, 1))
        pixels, mask = sample.pixels, sample.mask
        if draw(0, 1) < self.settings.flip:
            pixels, mask = pixels.flip(2), mask.flip(1)
        strength = self.settings.colour
        if strength:
            pixels = transforms.adjust_brightness(pixels, draw(1 - strength, 1 + strength))
            pixels = transforms.adjust_contrast(pixels, draw(1 - strength, 1 + strength))
            pixels = transforms.adjust_saturation(pixels, draw(1 - strength, 1 + strength))
        return Sample(pixels, mask)


def _cut(sample: Sample, size: tuple[int, int], down: float, right: float) -> Sample:
    """A part of this size at a relative place; black and void where there is no image."""
    own = (int(sample.mask.shape[0]), int(sample.mask.shape[1]))
    if own == size:
        return sample
    pixels = torch.zeros((3, *size), dtype=torch.uint8)
    mask = torch.full(size, VOID, dtype=torch.uint8)
    source, target = [], []
    for have, want, place in zip(own, size, (down, right), strict=True):
        start = round((have - want) * place) if have > want else 0
        into = round((want - have) * place) if want > have else 0
        length = min(have, want)
        source.append(slice(start, start + length))
        target.append(slice(into, into + length))
    pixels[:, target[0], target[1]] = sample.pixels[:, source[0], source[1]]
    mask[target[0], target[1]] = sample.mask[source[0], source[1]]
    return Sample(pixels, mask)


@dataclass(frozen=True)
class Collate:
    """Samples → a batch: normalised images (N, 3, H, W), int64 masks (N, H, W).

    Attributes:
        mean, std: per channel, of images in [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch.

        Raises:
            DataError: images differ in size.
        """
        sizes = {tuple(sample.mask.shape) for sample in samples}
        if len(sizes) > 1:
            shown = " and ".join(f"{h}×{w}" for h, w in sorted(sizes)[:2])
            raise DataError(f"images differ in size: {shown}", where="data.image_size")
        pixels = torch.stack([sample.pixels for sample in samples]).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        masks = torch.stack([sample.mask for sample in samples]).long()
        return Batch(Inputs(((pixels - mean) / std,)), masks)


def pixels_of(inputs: Inputs, preprocessing: Mapping[str, Any]) -> Tensor:
    """Images of a batch as they were before normalisation, floats in 0 … 1, (N, 3, H, W)."""
    images: Tensor = inputs.args[0].detach().cpu().float()
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images * std + mean).clamp(0, 1)
