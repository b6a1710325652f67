"""From settings to splits that can be iterated over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkit.artifact import content_hash
from slimkit.doors import door
from slimkit.errors import DataError
from slimkit.tasks.data.loaders import ArrayLoader
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit, read_source
from slimkit.tasks.data.splitting import stratified
from slimkit.tasks.data.stores import ImageStore, MemoryStore
from slimkit.tasks.splits import Splits

__all__ = ["ImageSplits", "load_data", "synthetic_data"]


@dataclass(frozen=True)
class ImageSplits(Splits):
    """A data set of images of one size.

    Attributes:
        train, calibration, validation, test: see the base class.
        fingerprint: SHA-256 (hex) of the content and of the settings that shape it.
        samples_fingerprint: the same without what decides only how images are batched: equal
            where a training sample's number means the same image, changed in the same way.
        shape: (C, H, W) of one image.
        preprocessing: what turns an image into an input: ``mean``, ``std`` (of images in
            [0, 1]), ``scale`` (255), ``layout``, ``size``, ``channels``, ``classes``.
        facts: ``shape``, and ``skipped``: unreadable images that were left out, per split.
    """

    train: ArrayLoader
    calibration: ArrayLoader
    validation: ArrayLoader | None
    test: ArrayLoader
    shape: tuple[int, int, int] = (0, 0, 0)
    samples_fingerprint: str = ""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Unreadable images that were left out, per split."""
        return dict(self.facts.get("skipped", {}))


@door
def load_data(settings: DataSettings) -> ImageSplits:
    """Read, split and normalise a data source.

    Args:
        settings: which source, how large, how batched.

    Raises:
        UnknownNameError: unknown kind of source.
        DataError: missing, empty or damaged data; sizes or settings that do not fit it.
    """
    raw = read_source(settings)
    train = _limited(raw.train.labels, settings)
    test = _limited(raw.test.labels, settings)
    if raw.validation is not None:
        validation_split = raw.validation
        validation = _limited(raw.validation.labels, settings)
    else:
        validation_split = raw.train
        train, validation = _held_out(train, raw.train.labels, settings)
    return _splits(raw, validation_split, train, validation, test, settings)


def _splits(
    raw: RawData,
    validation_split: RawSplit,
    train: Tensor,
    validation: Tensor,
    test: Tensor,
    settings: DataSettings,
) -> ImageSplits:
    height, width, channels = raw.train.store.shape
    if raw.test.store.shape != (height, width, channels):
        raise DataError(
            f"training images are {height}×{width}, test images {raw.test.store.shape[:2]}",
            where="data.image_size",
            hint="set image_size",
        )
    if settings.augment.crop > min(height, width):
        raise DataError(
            f"expected at most {min(height, width)}, got {settings.augment.crop}: images of "
            f"{height}×{width} would often be all black",
            where="data.augment.crop",
        )
    mean, std = _statistics(raw.train.store, train, channels, settings)
    common: dict[str, Any] = {"mean": mean, "std": std, "seed": settings.seed}
    still = {**common, "batch_size": settings.eval_batch_size}
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed))
    return ImageSplits(
        train=ArrayLoader(
            raw.train.store,
            raw.train.labels,
            **common,
            batch_size=settings.batch_size,
            role="train",
            indices=train,
            shuffle=True,
            augment=settings.augment,
            drop_last=True,
        ),
        calibration=ArrayLoader(
            raw.train.store, raw.train.labels, **still, role="train", indices=train[order]
        ),
        validation=ArrayLoader(
            validation_split.store,
            validation_split.labels,
            **still,
            role="validation",
            indices=validation,
        )
        if len(validation)
        else None,
        test=ArrayLoader(raw.test.store, raw.test.labels, **still, role="test", indices=test),
        classes=raw.classes,
        fingerprint=_fingerprint(raw.digest, settings),
        shape=(channels, height, width),
        preprocessing={
            "mean": list(mean),
            "std": list(std),
            "scale": 255,
            "layout": "NCHW",
            "size": [height, width],
            "channels": channels,
            "crop_fraction": settings.crop_fraction,
            "classes": list(raw.classes),
        },
        facts={
            "shape": [channels, height, width],
            "skipped": {
                "train": raw.train.store.skipped,
                "validation": raw.validation.store.skipped if raw.validation else 0,
                "test": raw.test.store.skipped,
            },
        },
        samples_fingerprint=_fingerprint(raw.digest, settings, "batch_size"),
    )


def _limited(labels: Tensor, settings: DataSettings) -> Tensor:
    """All indices, or ``limit`` of them in proportion to the classes."""
    if settings.limit is None or settings.limit >= len(labels):
        return torch.arange(len(labels))
    return stratified(labels, settings.limit, seed=settings.seed)[1]


def _held_out(train: Tensor, labels: Tensor, settings: DataSettings) -> tuple[Tensor, Tensor]:
    wanted = settings.validation
    count = wanted if isinstance(wanted, int) else round(wanted * len(train))
    rest, held = stratified(labels[train], count, seed=settings.seed)
    return train[rest], train[held]


def _statistics(
    store: ImageStore, train: Tensor, channels: int, settings: DataSettings
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of images in [0, 1]: given, or measured on ≤ 10,000."""
    if settings.mean is not None and settings.std is not None:
        if len(settings.mean) not in {1, channels}:
            raise DataError(
                f"{len(settings.mean)} means for images with {channels} channels",
                where="data.mean",
            )
        repeat = channels // len(settings.mean)
        return settings.mean * repeat, settings.std * repeat
    some = train[:: max(1, len(train) // 10_000)]
    count, total, squares = 0, torch.zeros(channels).double(), torch.zeros(channels).double()
    for chunk in torch.split(some, 500):
        images, _ = store.fetch(chunk)
        pixels = images.reshape(-1, channels).double() / 255
        count += len(pixels)
        total += pixels.sum(0)
        squares += pixels.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    deviation[deviation < 1e-3] = 1.0  # a constant channel stays as it is
    return (
        tuple(round(value, 4) for value in mean.tolist()),
        tuple(round(value, 4) for value in deviation.tolist()),
    )


def _fingerprint(digest: str, settings: DataSettings, *without: str) -> str:
    shaping = settings.model_dump(
        mode="json", exclude={"eval_batch_size", "cache", *without}, exclude_defaults=True
    )  # without defaults: a setting that is added later changes no fingerprint
    shaping["source"] = settings.source.partition(":")[0]  # the same data may lie elsewhere
    return content_hash({"content": digest, "settings": shaping})


@door
def synthetic_data(settings: DataSettings, classes: int, *, batches: int = 2) -> ImageSplits:
    """Random images in the layout that ``settings`` describes, without reading the source.

    Args:
        settings: image size (32 when not given), channels, batch sizes and augmentation.
        classes: number of classes.
        batches: training batches per epoch.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.image_size or 32
    channels = settings.channels or (1 if settings.source == "digits" else 3)

    def split(count: int) -> RawSplit:
        images = torch.randint(
            0, 256, (count, size, size, channels), dtype=torch.uint8, generator=generator
        )
        return RawSplit(MemoryStore(images), torch.arange(count) % classes)

    train, test = split(batches * settings.batch_size), split(settings.eval_batch_size)
    validation = split(settings.eval_batch_size)
    raw = RawData(
        train=train,
        test=test,
        validation=validation,
        classes=[str(label) for label in range(classes)],
        digest="synthetic",
    )
    counted = torch.arange(max(len(train.labels), len(test.labels)))
    every = counted[: len(test.labels)]
    return _splits(raw, validation, counted[: len(train.labels)], every, every, settings)
