"""Images with a mask each: what a source of segmentation data gives, and folders of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import DataError
from slimkit.tasks.data.imagefolder import image_files
from slimkit.tasks.data.sources import data_folder, files_digest
from slimkit.tasks.segmentation.settings import SegmentationDataSettings

__all__ = ["VOID", "MaskSet", "Masked", "decoded_image", "decoded_mask", "read_mask_folder"]

VOID = 255
"""Label of pixels that belong to no class: no loss and no metric looks at them."""

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Masked:
    """An image and its mask.

    Attributes:
        image: a file, or uint8 (3, H, W).
        mask: a file, or uint8 (H, W) of class numbers and :data:`VOID`.
    """

    image: Path | Tensor
    mask: Path | Tensor


@dataclass(frozen=True)
class MaskSet:
    """All splits of a source.

    Attributes:
        splits: ``train``, and ``val`` or ``test`` or both.
        classes: names in the order of the numbers.
        digest: SHA-256 (hex) of the content.
        problems: what was left out → how often, with an example.
    """

    splits: Mapping[str, Sequence[Masked]]
    classes: Sequence[str]
    digest: str
    problems: Mapping[str, Any] = field(default_factory=dict)


def read_mask_folder(argument: str, settings: SegmentationDataSettings) -> MaskSet:
    """Read ``masks:DIR``: ``images/SPLIT/NAME.jpg`` beside ``masks/SPLIT/NAME.png``.

    A mask holds the number of a class per pixel, grey or with a palette. Names come from
    ``classes.txt``, a line each; without it classes are as many as the largest number in the
    training masks says.

    Raises:
        DataError: a folder is missing or empty; or a mask is (``on_bad_mask``) missing, of another
            size than its image, of colours, or with numbers beyond the classes.
    """
    root = data_folder(argument, "masks")
    found = {name: _pairs(root, names) for name, names in _SPLITS.items()}
    splits = {name: pairs for name, pairs in found.items() if pairs is not None}
    if "train" not in splits or len(splits) < 2:
        raise DataError(
            f"there is no {'train' if 'train' not in splits else 'val and no test'} split in it",
            where=str(root),
            hint="expected images/train, masks/train, and the same for val or test",
        )
    names = _class_names(root)
    checker = _Checker(settings, len(names) if names else None)
    kept = {name: checker.sound(pairs) for name, pairs in splits.items()}
    for name, pairs in kept.items():
        if not pairs:
            raise DataError(f"no image of its {name} split has a mask", where=str(root))
    classes = names or [str(number) for number in range(checker.largest + 1)]
    files = [file for pairs in kept.values() for pair in pairs for file in pair]
    return MaskSet(
        {name: [Masked(*pair) for pair in pairs] for name, pairs in kept.items()},
        classes,
        files_digest(files),
        checker.facts(),
    )


def decoded_image(image: Path | Tensor) -> Tensor:
    """uint8 (3, H, W).

    Raises:
        DataError: the file is cut off or no image.
    """
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(_opened(image, "RGB").copy()).permute(2, 0, 1)


def decoded_mask(mask: Path | Tensor, void: int | None) -> Tensor:
    """Class numbers, uint8 (H, W); ``void`` becomes :data:`VOID`.

    Raises:
        DataError: the file is cut off, no image, or one of colours.
    """
    if isinstance(mask, Tensor):
        return mask
    labels = torch.from_numpy(_opened(mask, None).copy())
    if void is not None and void != VOID:
        labels[labels == void] = VOID
    return labels


def _opened(path: Path, mode: str | None) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if mode is None and image.mode not in {"L", "P", "1"}:
                raise DataError(
                    f"a mask holds numbers of classes, and this is an image of mode {image.mode}",
                    where=str(path),
                    hint="save it grey, or with a palette",
                )
            return np.asarray(image.convert(mode) if mode else image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be read: {error}", where=str(path)) from error


def _pairs(root: Path, names: Sequence[str]) -> list[tuple[Path, Path]] | None:
    """Images with the place of their masks; None where there is no such split."""
    for name in names:
        images, masks = root / "images" / name, root / "masks" / name
        if images.is_dir():
            if not masks.is_dir():
                raise DataError("there are images, but no masks", where=str(masks))
            by_stem = {path.stem: path for path in image_files(masks)}
            return [
                (path, by_stem.get(path.stem, masks / f"{path.stem}.png"))
                for path in image_files(images)
            ]
    return None


def _class_names(root: Path) -> list[str]:
    path = root / "classes.txt"
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"it cannot be read: {error}", where=str(path)) from error
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < len(names) or not 0 < len(names) < VOID:
        raise DataError("expected a different name in every line, 254 at most", where=str(path))
    return names


class _Checker:
    """Looks at every mask once, and counts what is left out."""

    def __init__(self, settings: SegmentationDataSettings, classes: int | None) -> None:
        self.settings, self.classes = settings, classes
        self.largest = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def sound(self, pairs: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
        """Those that can be used."""
        return [pair for pair in pairs if self._is_sound(*pair)]

    def facts(self) -> dict[str, Any]:
        """What the report says."""
        return {
            kind: {"count": count, "example": self._examples[kind]}
            for kind, count in self._counts.items()
        }

    def _is_sound(self, image: Path, mask: Path) -> bool:
        try:
            kind = self._problem(image, mask)
            message = kind
        except DataError as error:
            kind, message = "unreadable", error.message
        if kind is None:
            return True
        if self.settings.on_bad_mask == "error":
            raise DataError(
                str(message), where=str(mask), hint="on_bad_mask: skip leaves such images out"
            )
        self._counts[kind] += 1
        self._examples.setdefault(kind, f"{mask.name}: {message}")
        return False

    def _problem(self, image: Path, mask: Path) -> str | None:
        from PIL import Image

        if not mask.is_file():
            return "there is no mask for the image"
        labels = decoded_mask(mask, self.settings.void)
        try:
            with Image.open(image) as opened:
                width, height = opened.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"its image cannot be read: {error}", where=str(image)) from error
        if tuple(labels.shape) != (height, width):
            return (
                f"the mask has {labels.shape[1]}×{labels.shape[0]} pixels, its image "
                f"{width}×{height}"
            )
        inside = labels[labels != VOID]
        largest = int(inside.max()) if inside.numel() else 0
        if self.classes is not None and largest >= self.classes:
            return f"it holds the number {largest}, and there are {self.classes} classes (void?)"
        self.largest = max(self.largest, largest)
        return None
