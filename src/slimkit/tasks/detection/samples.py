"""From scenes to samples: pixels decoded, brought to the input's size, boxes along with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import DataError
from slimkit.inputs import Batch, Inputs
from slimkit.tasks.data.stores import free_memory
from slimkit.tasks.detection.scenes import Scene

__all__ = ["PAD", "Collate", "Placement", "Sample", "SceneSamples", "place"]

PAD = 114
"""Grey level of padding: about the mean of natural images, so that edges do not stand out."""


@dataclass(frozen=True)
class Placement:
    """How an image lies in the input: ``input = image · scale + shift``, x and y apart.

    Attributes:
        scale: of x and of y.
        shift: of x and of y, in pixels of the input.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def to_input(self, boxes: Tensor) -> Tensor:
        """Boxes (…, 4) of the image as boxes of the input."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.shift * 2)

    def to_image(self, boxes: Tensor) -> Tensor:
        """The inverse of :meth:`to_input`."""
        return (boxes - boxes.new_tensor(self.shift * 2)) / boxes.new_tensor(self.scale * 2)


@dataclass(frozen=True)
class Sample:
    """Pixels and boxes on their way into a batch.

    Attributes:
        pixels: uint8 (3, H, W).
        boxes: x1, y1, x2, y2 in its pixels, float32 (G, 4).
        labels: int64 (G,).
        scene: where it comes from.
        placement: of the scene's image in these pixels; None where it was changed at random.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    scene: Scene
    placement: Placement | None = None


class SceneSamples:
    """Scenes by number as samples of the input's size.

    Decoded images are kept while memory is free for all of them.

    Args:
        scenes: what there is.
        size: height and width of the input; None keeps each image's own.
        letterbox: keep the aspect ratio and pad.
        whole: give samples in the image's own size, for what changes them at random first.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        size: tuple[int, int] | None,
        *,
        letterbox: bool = False,
        whole: bool = False,
    ) -> None:
        self.scenes, self.size, self.letterbox, self.whole = scenes, size, letterbox, whole
        needed = 3 * sum(scene.size[0] * scene.size[1] for scene in scenes)
        self._keep = needed < free_memory() / 4
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, number: int) -> Sample:
        scene = self.scenes[number]
        pixels = self._pixels(number)
        kept = ~scene.crowd if self.whole else torch.ones(len(scene.boxes), dtype=torch.bool)
        sample = Sample(pixels, scene.boxes[kept], scene.labels[kept], scene, Placement())
        if self.whole or self.size is None:
            return sample
        return place(sample, self.size, letterbox=self.letterbox)

    def name_of(self, number: int) -> str:
        """The file of an image, for errors."""
        return self.scenes[number].name

    def _pixels(self, number: int) -> Tensor:
        held = self._decoded.get(number)
        if held is None:
            held = _decoded(self.scenes[number])
            if self._keep:
                self._decoded[number] = held
        return held


def _decoded(scene: Scene) -> Tensor:
    if isinstance(scene.image, Tensor):
        return scene.image
    from PIL import Image

    try:
        with Image.open(scene.image) as image:
            array = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the image cannot be read: {error}",
            where=str(scene.image),
            hint="mend or remove it, or take it out of the annotations",
        ) from error
    if array.shape[:2] != scene.size:
        raise DataError(
            f"the image has {array.shape[1]}×{array.shape[0]} pixels, its annotation says "
            f"{scene.size[1]}×{scene.size[0]}",
            where=str(scene.image),
        )
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def place(sample: Sample, size: tuple[int, int], *, letterbox: bool = False) -> Sample:
    """Bring a sample to the input's size by Pillow's bilinear filter, as ``predict.py`` does."""
    from PIL import Image

    height, width = sample.pixels.shape[1:]
    scale = size[1] / width, size[0] / height
    target = size
    shift = (0.0, 0.0)
    if letterbox:
        factor = min(scale)
        target = max(1, round(height * factor)), max(1, round(width * factor))
        scale = target[1] / width, target[0] / height
        shift = float((size[1] - target[1]) // 2), float((size[0] - target[0]) // 2)
    pixels = sample.pixels
    if target != (height, width):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        resized = image.resize((target[1], target[0]), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
    if letterbox and target != size:
        left, top = int(shift[0]), int(shift[1])
        canvas = torch.full((3, *size), PAD, dtype=torch.uint8)
        canvas[:, top : top + target[0], left : left + target[1]] = pixels
        pixels = canvas
    placement = Placement(scale, shift)
    boxes = placement.to_input(sample.boxes)
    known = placement if sample.placement == Placement() else None
    return replace(sample, pixels=pixels, boxes=boxes, placement=known)


@dataclass(frozen=True)
class Collate:
    """Samples → a batch: normalised images, and per image a target.

    Attributes:
        mean, std: per channel, of images in [0, 1].
        stack: one tensor (N, 3, H, W); False gives the list of images as one argument.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    stack: bool

    def __call__(self, samples: list[Sample]) -> Batch:
        """One batch; its targets also say which scene each image is, and how it was placed."""
        mean = torch.tensor(self.mean).view(-1, 1, 1) * 255
        std = torch.tensor(self.std).view(-1, 1, 1) * 255
        images = [(sample.pixels.float() - mean) / std for sample in samples]
        inputs: Any = torch.stack(images) if self.stack else images
        return Batch(Inputs((inputs,)), [self._target(sample) for sample in samples])

    @staticmethod
    def _target(sample: Sample) -> Mapping[str, Any]:
        scene = sample.scene
        return {
            "boxes": sample.boxes,
            "labels": sample.labels,
            "scene": scene,
            "placement": sample.placement,
        }
