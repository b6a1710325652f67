"""``digits``: 1797 real handwritten digits of 8×8 pixels that scikit-learn brings along."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.errors import DataError
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit
from slimkit.tasks.data.splitting import stratified
from slimkit.tasks.data.stores import MemoryStore

__all__ = ["read_digits"]

_TEST_IMAGES = 540


def read_digits(argument: str, settings: DataSettings) -> RawData:
    """Read the digits, enlarged to ``image_size`` (bilinear) and split 1257 / 540.

    The test split is drawn in proportion to the classes, and is always the same.

    Raises:
        DataError: an argument was given (``digits`` takes none).
    """
    from sklearn.datasets import load_digits

    if argument:
        raise DataError(f"digits takes no argument, got {argument!r}", where="data.source")
    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images).float()  # (1797, 8, 8), 0 … 16
    labels = torch.from_numpy(bunch.target).long()
    digest = hashlib.sha256(bunch.images.tobytes() + bunch.target.tobytes()).hexdigest()
    images = _enlarged(pixels, settings.image_size or 8, settings.channels or 1)
    train, test = stratified(labels, _TEST_IMAGES, seed=0)
    return RawData(
        train=RawSplit(MemoryStore(images[train]), labels[train]),
        test=RawSplit(MemoryStore(images[test]), labels[test]),
        validation=None,
        classes=[str(digit) for digit in range(10)],
        digest=digest,
    )


def _enlarged(pixels: Tensor, size: int, channels: int) -> Tensor:
    """(N, 8, 8) in 0 … 16 → uint8 (N, size, size, channels)."""
    planes = pixels.unsqueeze(1) * (255 / 16)
    if size != planes.shape[-1]:
        planes = F.interpolate(planes, (size, size), mode="bilinear", align_corners=False)
    whole = planes.round().clamp(0, 255).to(torch.uint8)
    return whole.permute(0, 2, 3, 1).expand(-1, -1, -1, channels)
