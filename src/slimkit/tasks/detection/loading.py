"""From settings to splits of scenes that can be iterated over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slimkit.artifact import content_hash
from slimkit.errors import DataError
from slimkit.registry import Registry
from slimkit.tasks.detection.augmentation import Augment
from slimkit.tasks.detection.samples import Collate, SceneSamples
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.splits import Role, SampleLoader, Splits

__all__ = ["SCENE_SOURCES", "load_scenes", "read_scenes", "splits_of"]

SCENE_SOURCES: Registry[Callable[[str, Problems], SceneSet]] = Registry("source of scenes")
"""Readers by the part of ``source`` before the colon: ``(argument, problems) -> SceneSet``."""

SCENE_SOURCES.register_lazy(
    "digit-scenes", "slimkit.tasks.detection.digit_scenes:read_digit_scenes"
)
SCENE_SOURCES.register_lazy("coco", "slimkit.tasks.detection.coco:read_coco")
SCENE_SOURCES.register_lazy("voc", "slimkit.tasks.detection.voc:read_voc")
SCENE_SOURCES.register_lazy("yolo", "slimkit.tasks.detection.yolo:read_yolo")


def read_scenes(settings: DetectionDataSettings) -> SceneSet:
    """Read ``settings.source``.

    Raises:
        UnknownNameError: unknown kind of source, with the nearest.
        DataError: missing, empty or damaged data.
    """
    kind, _, argument = settings.source.partition(":")
    reader = SCENE_SOURCES.get(kind, where="data.source")
    return reader(argument, Problems(settings.on_bad_annotation))


def load_scenes(settings: DetectionDataSettings) -> Splits:
    """Read, split and batch a source of scenes."""
    found = read_scenes(settings)
    return splits_of(found, settings)


_ROLES: dict[str, Role] = {"train": "train", "val": "validation", "test": "test"}


def splits_of(found: SceneSet, settings: DetectionDataSettings) -> Splits:
    """Loaders of scenes.

    ``test`` is the source's test split, else its validation split; then a part of the training
    scenes is set aside to select by.

    Raises:
        DataError: there is neither a test nor a validation split, or a part is empty.
    """
    train = list(found.splits["train"])
    validation: list[Scene] | None = None
    if "test" in found.splits:
        test = list(found.splits["test"])
        if "val" in found.splits:
            validation = list(found.splits["val"])
    elif "val" in found.splits:
        test = list(found.splits["val"])
    else:
        raise DataError("there is neither a val nor a test split", where="data.source")
    generator = torch.Generator().manual_seed(settings.seed)
    if validation is None and settings.validation:
        share = settings.validation
        count = share if isinstance(share, int) else max(1, round(share * len(train)))
        if count >= len(train):
            raise DataError(
                f"{count} of {len(train)} training scenes would be set aside",
                where="data.validation",
            )
        order = torch.randperm(len(train), generator=generator).tolist()
        validation = [train[index] for index in sorted(order[:count])]
        train = [train[index] for index in sorted(order[count:])]
    if settings.limit is not None:
        train, test = train[: settings.limit], test[: settings.limit]
        validation = None if validation is None else validation[: settings.limit]
    fingerprint = content_hash(
        {"digest": found.digest, "settings": settings.model_dump(mode="json", exclude={"workers"})}
    )
    return Splits(
        train=_loader(train, "train", settings, augmented=True),
        calibration=_loader(train, "train", settings, augmented=False),
        validation=None if validation is None else _loader(validation, "validation", settings),
        test=_loader(test, "test", settings),
        fingerprint=fingerprint,
        classes=found.classes,
        preprocessing=_preprocessing(settings),
        facts={"problems": found.problems.facts()} if found.problems.counts else {},
        named={
            name: _loader(scenes[: settings.limit], _ROLES[name], settings)
            for name, scenes in found.splits.items()
        },
    )


def _loader(
    scenes: Sequence[Scene],
    role: Role,
    settings: DetectionDataSettings,
    *,
    augmented: bool = False,
) -> SampleLoader:
    size, letterbox = settings.size or _common_size(scenes), settings.resize == "letterbox"
    samples = SceneSamples(scenes, size, letterbox=letterbox, whole=augmented)
    change: Any = None
    if augmented:
        change = Augment(settings.augment, samples, size, letterbox)
    indices = None
    if role == "train" and not augmented:  # calibration: one fixed random order
        generator = torch.Generator().manual_seed(settings.seed)
        indices = torch.randperm(len(scenes), generator=generator)
    return SampleLoader(
        samples,
        Collate(settings.mean, settings.std, stack=size is not None),
        batch_size=settings.batch_size if augmented else settings.eval_batch_size,
        role=role,
        change=change,
        indices=indices,
        shuffle=augmented,
        workers=settings.workers,
    )


def _common_size(scenes: Sequence[Scene]) -> tuple[int, int] | None:
    """Of all scenes; None where they differ."""
    sizes = {scene.size for scene in scenes}
    return sizes.pop() if len(sizes) == 1 else None


def _preprocessing(settings: DetectionDataSettings) -> dict[str, Any]:
    size = settings.size
    return {
        "mean": list(settings.mean),
        "std": list(settings.std),
        "scale": 255,
        "layout": "NCHW",
        "size": None if size is None else list(size),
        "channels": 3,
        "resize": settings.resize,
        "pad": 114,
    }
