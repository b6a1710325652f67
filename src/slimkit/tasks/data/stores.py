"""Where pixels live: decoded in memory, or in files that are decoded batch by batch."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from slimkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Decoder", "FileStore", "ImageStore", "MemoryStore", "decode_all", "free_memory"]


class ImageStore(Protocol):
    """Images by number."""

    @property
    def skipped(self) -> int:
        """Unreadable images that were left out."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W, C), and the positions in ``indices`` that could be read, (B,)."""


class MemoryStore:
    """Decoded images in one uint8 tensor (N, H, W, C)."""

    def __init__(self, images: Tensor, skipped: int = 0) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images must be uint8 (N, H, W, C), got {images.dtype} {tuple(images.shape)}",
                where="images",
            )
        self.images = images.contiguous()
        self.skipped = skipped

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Some images, all of them readable."""
        return self.images.index_select(0, indices), torch.arange(len(indices))


class Decoder:
    """Bytes of an image file → uint8 (H, W, C).

    Args:
        size: height and width to resize and centre-crop to; ``None`` keeps the image's own.
        channels: 1 or 3.
        crop_fraction: part of the resized image that the centre crop keeps per side.
    """

    def __init__(self, size: int | None, channels: int, crop_fraction: float = 1.0) -> None:
        self.size = size
        self.channels = channels
        self.crop_fraction = crop_fraction

    def __call__(self, data: bytes | Path, *, where: str) -> NDArray[np.uint8]:
        """Decode one image.

        Raises:
            DataError: it is cut off or not an image; ``where`` names it.
        """
        from PIL import Image

        try:
            opened = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
            with opened as image:
                if self.size is not None:  # JPEG can be decoded at ½, ¼, ⅛ for nothing
                    side = round(self.size / self.crop_fraction)
                    image.draft(None, (2 * side, 2 * side))
                return self.pixels(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"the image cannot be read: {error}",
                where=where,
                hint="set on_bad_image: skip to leave such images out",
            ) from error

    def pixels(self, image: Any) -> NDArray[np.uint8]:
        """An opened (PIL) image, converted, resized and cropped."""
        import numpy as np

        converted = image.convert("L" if self.channels == 1 else "RGB")
        array = np.asarray(self._sized(converted), dtype=np.uint8)
        return array.reshape(*array.shape[:2], self.channels)

    def _sized(self, image: Any) -> Any:
        from PIL import Image

        if self.size is None or image.size == (self.size, self.size):
            return image
        width, height = image.size
        side = round(self.size / self.crop_fraction)
        factor = side / min(width, height)
        if factor != 1:
            width, height = max(side, round(width * factor)), max(side, round(height * factor))
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


class FileStore:
    """Images in files, decoded by a few threads whenever a batch asks for them.

    Args:
        files: one path per image.
        decoder: must have a size.
        on_bad_image: ``"skip"`` leaves unreadable images out of their batch and counts each
            once; ``"error"`` raises.
    """

    def __init__(
        self, files: Sequence[Path], decoder: Decoder, on_bad_image: Literal["error", "skip"]
    ) -> None:
        self.files = list(files)
        self.decoder = decoder
        self.on_bad_image = on_bad_image
        self._bad: set[int] = set()
        self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "slimkit-decode")

    @property
    def skipped(self) -> int:
        """Unreadable images met so far."""
        return len(self._bad)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) after decoding."""
        size = self.decoder.size
        if size is None:
            raise DataError("images that stay in files need an image_size", where="image_size")
        return size, size, self.decoder.channels

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Decode some images; see :class:`ImageStore`."""
        decoded = list(self._pool.map(self._decode, indices.tolist()))
        kept = [position for position, pixels in enumerate(decoded) if pixels is not None]
        if not kept:
            raise DataError("not one image of a batch can be read", where=str(self.files[0].parent))
        return (
            torch.stack([torch.from_numpy(decoded[position].copy()) for position in kept]),
            torch.tensor(kept),
        )

    def _decode(self, index: int) -> Any:
        path = self.files[index]
        try:
            return self.decoder(path, where=str(path))
        except DataError:
            if self.on_bad_image == "error":
                raise
            self._bad.add(index)
            return None


def decode_all(
    items: Sequence[tuple[bytes | Path, str]],
    decoder: Decoder,
    on_bad_image: Literal["error", "skip"],
) -> tuple[MemoryStore, list[int]]:
    """Decode everything into memory.

    Args:
        items: bytes or path of each image, and what to call it in an error.
        decoder: how.
        on_bad_image: raise, or leave out and count.

    Returns:
        The store, and which items are in it.

    Raises:
        DataError: an unreadable image, none left, or unequal sizes without an ``image_size``.
    """

    def attempt(item: tuple[bytes | Path, str]) -> Any:
        try:
            return decoder(item[0], where=item[1])
        except DataError as error:
            return error

    decoded: Any
    if any(isinstance(data, Path) for data, _ in items[:1]):
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            decoded = list(pool.map(attempt, items))
    else:  # small images in memory: threads would only fight for the interpreter
        decoded = map(attempt, items)
    return _collect(decoded, items, on_bad_image)


def _collect(
    decoded: Any,
    items: Sequence[tuple[bytes | Path, str]],
    on_bad_image: Literal["error", "skip"],
) -> tuple[MemoryStore, list[int]]:
    images: Tensor | None = None
    kept: list[int] = []
    for index, pixels in enumerate(decoded):
        if isinstance(pixels, DataError):
            if on_bad_image == "error":
                raise pixels
            continue
        if images is None:
            _check_memory(len(items) * pixels.nbytes, items[index][1])
            images = torch.empty((len(items), *pixels.shape), dtype=torch.uint8)
        if images.shape[1:] != pixels.shape:
            raise DataError(
                f"images differ in size: {tuple(pixels.shape[:2])} "
                f"after {tuple(images.shape[1:3])}",
                where=items[index][1],
                hint="set image_size",
            )
        images[len(kept)] = torch.from_numpy(pixels.copy())
        kept.append(index)
    if images is None:
        raise DataError("there is no readable image", where=items[0][1] if items else None)
    return MemoryStore(images[: len(kept)], skipped=len(items) - len(kept)), kept


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def _check_memory(needed: int, where: str) -> None:
    free = free_memory()
    if needed > 0.8 * free:
        raise DataError(
            f"the decoded images take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free",
            where=where,
            hint="a smaller image_size, or imagefolder: with cache: files",
        )
