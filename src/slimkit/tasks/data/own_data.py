"""``package.module:function``: a data set of one's own, as a function that returns its splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import DataError, SlimkitError
from slimkit.registry import import_object
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit, checked_labels
from slimkit.tasks.data.stores import Decoder, MemoryStore

__all__ = ["read_own"]

_SPLITS = ("train", "test", "validation")
_HINT = 'return {"train": dataset, "test": dataset, "classes": names}'


def read_own(source: str, settings: DataSettings) -> RawData:
    """Call a function of one's own and read the data sets that it returns into memory.

    The function takes nothing and returns a mapping: ``train`` and ``test``, perhaps
    ``validation``, are indexable data sets (a ``torch.utils.data.Dataset``, a list) of pairs
    (image, label); ``classes``, if given, are names in the order of the labels. An image is one of
    PIL's, a uint8 array (H, W) or (H, W, C), or a tensor (C, H, W), uint8 or float in [0, 1]. A
    label is a number from 0.

    Args:
        source: ``package.module:function``.
        settings: size and channels that images are brought to.

    Raises:
        DataError: it fails, or returns something else; the message names split and sample.
        UnknownNameError: there is no such function.
    """
    function = import_object(source, where="data.source")
    if not callable(function):
        raise DataError("it is no function", where=source, hint=_HINT)
    try:
        made = function()
    except SlimkitError:
        raise
    except Exception as error:  # anything may go wrong in a function of the user's own
        raise DataError(f"it failed: {type(error).__name__}: {error}", where=source) from error
    if not isinstance(made, Mapping) or not {"train", "test"} <= made.keys():
        kind = sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
        raise DataError(f"it returned {kind}, not its splits", where=source, hint=_HINT)
    unknown = sorted(set(map(str, made)) - {*_SPLITS, "classes"})
    if unknown:
        raise DataError(f"{unknown[0]!r} is no split", where=source, hint=", ".join(_SPLITS))
    digest = hashlib.sha256()
    found: dict[str, tuple[MemoryStore, list[int]]] = {}
    for split in _SPLITS:
        if made.get(split) is not None:
            found[split] = _read(made[split], f"{source} {split}", settings)
            digest.update(found[split][0].images.numpy().tobytes())
            digest.update(repr((split, found[split][1])).encode())
    names = made.get("classes")
    largest = max(max(labels) for _, labels in found.values())
    classes = [str(n) for n in (names if names is not None else range(largest + 1))]
    splits = {
        split: RawSplit(store, checked_labels(labels, classes, f"{source} {split}"))
        for split, (store, labels) in found.items()
    }
    return RawData(
        splits["train"], splits["test"], splits.get("validation"), classes, digest.hexdigest()
    )


def _read(dataset: Any, where: str, settings: DataSettings) -> tuple[MemoryStore, list[int]]:
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError("a data set needs a length", where=where) from error
    if not count:
        raise DataError("it is empty", where=where)
    images: list[Tensor] = []
    labels: list[int] = []
    decoder: Decoder | None = None
    for number in range(count):
        place = f"{where}[{number}]"
        try:
            image, label = dataset[number]
        except Exception as error:  # the user's own code
            raise DataError(
                f"expected a pair (image, label): {type(error).__name__}: {error}", where=place
            ) from error
        picture = _picture(image, place)
        if decoder is None:
            grey = picture.mode == "L"
            decoder = Decoder(settings.image_size, settings.channels or (1 if grey else 3))
            decoder.crop_fraction = settings.crop_fraction
        images.append(torch.from_numpy(decoder.pixels(picture).copy()))
        labels.append(_label(label, place))
        if images[0].shape != images[-1].shape:
            raise DataError("images differ in size", where=place, hint="set image_size")
    return MemoryStore(torch.stack(images)), labels


def _label(label: Any, where: str) -> int:
    try:
        number = int(label)
        whole = number == label and not isinstance(label, bool)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise DataError(f"expected a class number from 0, got {label!r}", where=where)
    return number


def _picture(image: Any, where: str) -> Any:
    """An image of PIL's from any of the forms that are accepted."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image if image.mode == "L" else image.convert("RGB")
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        if pixels.is_floating_point():
            if not bool(((pixels >= 0) & (pixels <= 1)).all()):
                raise DataError(
                    "a tensor of floats must lie in [0, 1]",
                    where=where,
                    hint="leave normalisation to data.mean and data.std",
                )
            pixels = (pixels * 255).round().to(torch.uint8)
        array = pixels.movedim(0, -1).numpy() if pixels.dim() == 3 else pixels.numpy()
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or array.ndim not in {2, 3} or array.shape[2:] not in {(), (3,)}:
        raise DataError(
            f"expected an image, got {type(image).__name__} {array.dtype} {array.shape}",
            where=where,
            hint="PIL, uint8 (H, W, C), or a tensor (C, H, W)",
        )
    return Image.fromarray(array)
