"""Readers of data sources: each turns its name into raw splits.

``@SOURCES.register("mine")`` on a function ``(argument, settings) -> RawData`` adds the source
``mine:ARGUMENT``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slimkit.errors import DataError, nearest
from slimkit.registry import Registry, import_object
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.stores import ImageStore

__all__ = [
    "SOURCES",
    "RawData",
    "RawSplit",
    "checked_labels",
    "data_folder",
    "files_digest",
    "find_folder",
    "read_source",
    "takes_own",
]


@dataclass(frozen=True)
class RawSplit:
    """Images and labels as the source has them.

    Attributes:
        store: the images.
        labels: int64 (N,), 0 … classes - 1.
    """

    store: ImageStore
    labels: Tensor


@dataclass(frozen=True)
class RawData:
    """All splits of a source.

    Attributes:
        train, test: always there.
        validation: only when the source has one beside its test split.
        classes: names in the order of the labels.
        digest: SHA-256 (hex) of the content.
    """

    train: RawSplit
    test: RawSplit
    validation: RawSplit | None
    classes: list[str]
    digest: str


SOURCES: Registry[Callable[[str, DataSettings], RawData]] = Registry("data source")
"""Readers by the part of ``source`` before the colon."""

SOURCES.register_lazy("digits", "slimkit.tasks.data.digits:read_digits")
SOURCES.register_lazy("parquet", "slimkit.tasks.data.parquet:read_parquet")
SOURCES.register_lazy("imagefolder", "slimkit.tasks.data.imagefolder:read_imagefolder")
SOURCES.register_lazy("images", "slimkit.tasks.data.unlabelled:read_images")
SOURCES.register_lazy("torchvision", "slimkit.tasks.data.torchvision_data:read_torchvision")


def read_source(settings: DataSettings) -> RawData:
    """Read ``settings.source``, a registered kind or a function of one's own.

    Raises:
        UnknownNameError: unknown kind of source, with the nearest.
        DataError: missing, empty or damaged data.
    """
    kind, _, argument = settings.source.partition(":")
    if kind not in SOURCES and takes_own(settings.source):
        own: Any = import_object("slimkit.tasks.data.own_data:read_own")
        return cast("RawData", own(settings.source, settings))
    return SOURCES.get(kind, where="data.source")(argument, settings)


def takes_own(source: str) -> bool:
    """Whether a source is ``package.module:function``, and there is such a module."""
    module, colon, function = source.partition(":")
    parts = [*module.split("."), *function.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def data_folder(argument: str, source: str) -> Path:
    """The folder that a source names: here, or under ``$SLIMKIT_DATA`` (``../shared/data``).

    Raises:
        DataError: it is nowhere; the message names every place looked at.
    """
    if not argument:
        raise DataError(f"{source}: needs a folder", where="data.source", hint=f"{source}:DIR")
    path = Path(argument).expanduser()
    root = Path(os.environ.get("SLIMKIT_DATA") or "../shared/data").expanduser()
    places = [path] if path.is_absolute() else [path, root / path]
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    siblings = [p.name for p in root.iterdir() if p.is_dir()] if root.is_dir() else []
    near = nearest(path.name, siblings) if siblings else ""
    hint = "set SLIMKIT_DATA to the folder that holds your data sets"
    raise DataError(
        f"there is no folder {looked}",
        where="data.source",
        hint=f"{near} {hint}" if near.startswith("did") else hint,
    )


def find_folder(source: str, kinds: Collection[str]) -> None:
    """Look whether the folder of a source is there, if the source is one of these kinds.

    Raises:
        DataError: it is not.
    """
    kind, _, argument = source.partition(":")
    if kind in kinds:
        data_folder(argument, kind)


def files_digest(files: list[Path], *, limit: int = 2**30) -> str:
    """SHA-256 (hex) of names and contents; of names and sizes where all is more than ``limit``."""
    digest = hashlib.sha256()
    contents = sum(file.stat().st_size for file in files) <= limit
    for file in files:
        digest.update(f"{file.parent.name}/{file.name}|{file.stat().st_size}|".encode())
        if contents:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def checked_labels(labels: list[int] | Tensor, classes: list[str], where: str) -> Tensor:
    """int64 labels, all between 0 and the number of classes.

    Raises:
        DataError: a label is outside.
    """
    tensor = torch.as_tensor(labels, dtype=torch.int64)
    outside = tensor[(tensor < 0) | (tensor >= len(classes))]
    if len(outside):
        raise DataError(
            f"label {int(outside[0])} is outside 0 … {len(classes) - 1}",
            where=where,
            hint=f"there are {len(classes)} classes; unlabelled images cannot be used here",
        )
    return tensor
