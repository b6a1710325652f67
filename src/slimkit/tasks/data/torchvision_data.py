"""``torchvision:NAME``: the classification data sets of torchvision, downloaded on first use."""

from __future__ import annotations

import hashlib
import inspect
import os
from pathlib import Path
from typing import Any

import torch

from slimkit.errors import DataError, UnknownNameError, nearest
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit, checked_labels
from slimkit.tasks.data.stores import Decoder, MemoryStore

__all__ = ["read_torchvision"]


def read_torchvision(argument: str, settings: DataSettings) -> RawData:
    """Read a data set such as ``CIFAR10`` or ``FashionMNIST`` into memory.

    It is looked for, and downloaded to, ``$SLIMKIT_DATA`` (``~/.cache/slimkit/data``).

    Raises:
        UnknownNameError: torchvision has no such data set.
        DataError: it has no train and test split of labelled images, or cannot be downloaded.
    """
    from torchvision import datasets

    factory = getattr(datasets, argument, None)
    if argument not in datasets.__all__ or factory is None:
        raise UnknownNameError(
            f"torchvision has no data set {argument!r}",
            where="data.source",
            hint=nearest(argument, datasets.__all__),
        )
    parts = {split: _opened(factory, argument, split) for split in ("train", "test")}
    names = getattr(parts["train"], "classes", None)
    digest = hashlib.sha256()
    splits: dict[str, tuple[MemoryStore, list[int]]] = {}
    for split, part in parts.items():
        splits[split] = _decoded(part, f"torchvision:{argument} {split}", settings)
        digest.update(splits[split][0].images.numpy().tobytes() + repr(splits[split][1]).encode())
    labels = splits["train"][1]
    classes = [str(n) for n in names] if names else [str(i) for i in range(max(labels) + 1)]
    train, test = (
        RawSplit(store, checked_labels(found, classes, f"torchvision:{argument}"))
        for store, found in splits.values()
    )
    return RawData(train, test, None, classes, digest.hexdigest())


def _opened(factory: Any, name: str, split: str) -> Any:
    """One split, from disk or else from the network."""
    known = inspect.signature(factory).parameters
    if "train" in known:
        chosen: dict[str, Any] = {"train": split == "train"}
    elif "split" in known:
        chosen = {"split": split}
    else:
        raise DataError(f"{name} has no train and test split", where="data.source")
    default = Path("~/.cache/slimkit/data")
    root = Path(os.environ.get("SLIMKIT_DATA") or default).expanduser()
    try:
        try:
            return factory(str(root), **chosen)
        except RuntimeError:  # torchvision's answer to files that are not there
            if "download" not in known:
                raise
            return factory(str(root), download=True, **chosen)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"the {split} split of {name} cannot be read: {error}",
            where="data.source",
            hint=f"put it into {root}, or set SLIMKIT_DATA to the folder that has it",
        ) from error


def _decoded(part: Any, where: str, settings: DataSettings) -> tuple[MemoryStore, list[int]]:
    channels = settings.channels
    images: list[torch.Tensor] = []
    labels: list[int] = []
    decoder: Decoder | None = None
    for image, label in part:
        if not isinstance(label, int):
            raise DataError("its targets are not class numbers", where=where)
        if decoder is None:
            grey = getattr(image, "mode", "RGB") == "L"
            decoder = Decoder(settings.image_size, channels or (1 if grey else 3))
            decoder.crop_fraction = settings.crop_fraction
        images.append(torch.from_numpy(decoder.pixels(image).copy()))
        labels.append(label)
        if images[0].shape != images[-1].shape:
            raise DataError("images differ in size", where=where, hint="set image_size")
    if not images:
        raise DataError("it is empty", where=where)
    return MemoryStore(torch.stack(images)), labels
