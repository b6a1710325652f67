"""From settings to splits of images and masks that can be iterated over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from slimkit.artifact import content_hash
from slimkit.errors import DataError
from slimkit.registry import Registry
from slimkit.tasks.segmentation.masks import Masked, MaskSet
from slimkit.tasks.segmentation.samples import Augment, Collate, MaskSamples
from slimkit.tasks.segmentation.settings import SegmentationDataSettings
from slimkit.tasks.splits import Role, SampleLoader, Splits

__all__ = ["MASK_SOURCES", "load_masks", "splits_of"]

MASK_SOURCES: Registry[Callable[[str, SegmentationDataSettings], MaskSet]] = Registry(
    "source of masks"
)
"""Readers by the part of ``source`` before the colon: ``(argument, settings) -> MaskSet``."""

MASK_SOURCES.register_lazy("digit-masks", "slimkit.tasks.segmentation.digit_masks:read_digit_masks")
MASK_SOURCES.register_lazy("masks", "slimkit.tasks.segmentation.masks:read_mask_folder")

_ROLES: dict[str, Role] = {"train": "train", "val": "validation", "test": "test"}


def load_masks(settings: SegmentationDataSettings) -> Splits:
    """Read, split and batch a source of masks.

    Raises:
        UnknownNameError: unknown kind of source, with the nearest.
        DataError: missing, empty or damaged data.
    """
    kind, _, argument = settings.source.partition(":")
    return splits_of(MASK_SOURCES.get(kind, where="data.source")(argument, settings), settings)


def splits_of(found: MaskSet, settings: SegmentationDataSettings) -> Splits:
    """Loaders of images and masks.

    ``test`` is the source's test split, else its validation split; then a part of the training
    images is set aside to select by.

    Raises:
        DataError: a part is empty.
    """
    train = list(found.splits["train"])
    validation: list[Masked] | None = None
    if "test" in found.splits:
        test = list(found.splits["test"])
        if "val" in found.splits:
            validation = list(found.splits["val"])
    else:
        test = list(found.splits["val"])
    if validation is None and settings.validation:
        train, validation = _held_out(train, settings)
    limit = settings.limit
    digest = {"digest": found.digest}
    shaping = settings.model_dump(mode="json", exclude={"workers"}, exclude_defaults=True)
    shaping["source"] = settings.source.partition(":")[0]
    return Splits(
        train=_loader(train[:limit], "train", settings, augmented=True),
        calibration=_loader(train[:limit], "train", settings),
        validation=None
        if validation is None
        else _loader(validation[:limit], "validation", settings),
        test=_loader(test[:limit], "test", settings),
        fingerprint=content_hash({**digest, "settings": shaping}),
        classes=list(found.classes),
        preprocessing={
            "mean": list(settings.mean),
            "std": list(settings.std),
            "scale": 255,
            "layout": "NCHW",
            "size": None if settings.size is None else list(settings.size),
            "channels": 3,
        },
        facts={"problems": dict(found.problems)} if found.problems else {},
        named={
            name: _loader(items[:limit], _ROLES[name], settings)
            for name, items in found.splits.items()
        },
    )


def _held_out(
    train: list[Masked], settings: SegmentationDataSettings
) -> tuple[list[Masked], list[Masked]]:
    share = settings.validation
    count = share if isinstance(share, int) else max(1, round(share * len(train)))
    if count >= len(train):
        raise DataError(
            f"{count} of {len(train)} training images would be set aside", where="data.validation"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(train), generator=generator).tolist()
    return (
        [train[index] for index in sorted(order[count:])],
        [train[index] for index in sorted(order[:count])],
    )


def _loader(
    items: Sequence[Masked],
    role: Role,
    settings: SegmentationDataSettings,
    *,
    augmented: bool = False,
) -> SampleLoader:
    indices = None
    if role == "train" and not augmented:  # calibration: one fixed random order
        generator = torch.Generator().manual_seed(settings.seed)
        indices = torch.randperm(len(items), generator=generator)
    return SampleLoader(
        MaskSamples(items, settings.size, void=settings.void, whole=augmented),
        Collate(settings.mean, settings.std),
        batch_size=settings.batch_size if augmented else settings.eval_batch_size,
        role=role,
        change=Augment(settings.augment, settings.size) if augmented else None,
        indices=indices,
        shuffle=augmented,
        workers=settings.workers,
    )
