"""``imagefolder:DIR``: one folder per class in ``train/`` and in ``test/`` or ``val/``."""

from __future__ import annotations

from pathlib import Path

import torch

from slimkit.errors import DataError, nearest
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit, data_folder, files_digest
from slimkit.tasks.data.stores import Decoder, FileStore, decode_all, free_memory

__all__ = ["image_files", "read_imagefolder"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


def read_imagefolder(argument: str, settings: DataSettings) -> RawData:
    """Read a folder of images, into memory if they fit there (``cache``).

    Labels follow the sorted names of the class folders in ``train/``. Where there is no
    ``test/``, ``val/`` is the test split, as is usual for ImageNet.

    Raises:
        DataError: a folder is missing or empty, a class is unknown in training, or an image
            cannot be read (``on_bad_image``).
    """
    root = data_folder(argument, "imagefolder")
    folders = {split: _existing(root, names) for split, names in _FOLDERS.items()}
    if folders["test"] is None:
        folders["test"], folders["validation"] = folders["validation"], None
    train, test, validation = folders["train"], folders["test"], folders["validation"]
    for split, folder in (("train", train), ("test", test)):
        if folder is None:
            raise DataError(
                f"there is no {split} folder in it",
                where=str(root),
                hint="expected train/CLASS/*.jpg, and test/CLASS/*.jpg or val/CLASS/*.jpg",
            )
    classes = sorted(p.name for p in _subfolders(train or root))
    if not classes:
        raise DataError("there is no class folder in it", where=str(train))
    listings = {
        split: _listing(folder, classes) for split, folder in folders.items() if folder is not None
    }
    in_memory = _fits(sum(len(files) for files, _ in listings.values()), settings)
    splits = {
        split: _split(files, labels, settings, in_memory=in_memory)
        for split, (files, labels) in listings.items()
    }
    return RawData(
        train=splits["train"],
        test=splits["test"],
        validation=splits["validation"] if validation is not None else None,
        classes=classes,
        digest=files_digest([file for files, _ in listings.values() for file in files]),
    )


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, in a fixed order; hidden files and folders are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _existing(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listing(folder: Path, classes: list[str]) -> tuple[list[Path], list[int]]:
    """Image files in a fixed order, and their labels."""
    files: list[Path] = []
    labels: list[int] = []
    for subfolder in _subfolders(folder):
        if subfolder.name not in classes:
            raise DataError(
                f"the class {subfolder.name!r} does not occur in training",
                where=str(folder),
                hint=nearest(subfolder.name, classes),
            )
        found = sorted(p for p in subfolder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        files.extend(found)
        labels.extend([classes.index(subfolder.name)] * len(found))
    if not files:
        raise DataError(
            "there is no image in its class folders",
            where=str(folder),
            hint="expected CLASS/*.jpg (or png, webp, bmp, tiff, ppm, gif)",
        )
    return files, labels


def _fits(count: int, settings: DataSettings) -> bool:
    if settings.cache != "auto" or settings.image_size is None:
        return settings.cache != "files"
    return 2 * count * settings.image_size**2 * (settings.channels or 3) < free_memory()


def _split(
    files: list[Path], labels: list[int], settings: DataSettings, *, in_memory: bool
) -> RawSplit:
    decoder = Decoder(settings.image_size, settings.channels or 3, settings.crop_fraction)
    if not in_memory:
        if settings.image_size is None:
            raise DataError(
                "images that stay in files need one size",
                where="data.image_size",
                hint="set image_size, or cache: memory",
            )
        store = FileStore(files, decoder, settings.on_bad_image)
        return RawSplit(store, torch.tensor(labels))
    items: list[tuple[bytes | Path, str]] = [(file, str(file)) for file in files]
    memory, kept = decode_all(items, decoder, settings.on_bad_image)
    return RawSplit(memory, torch.tensor(labels)[kept])
