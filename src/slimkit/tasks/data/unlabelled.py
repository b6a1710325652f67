"""``images:DIR``: images without labels, to calibrate with."""

from __future__ import annotations

import torch

from slimkit.errors import DataError
from slimkit.tasks.data.imagefolder import image_files
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import RawData, RawSplit, data_folder, files_digest
from slimkit.tasks.data.stores import Decoder, decode_all

__all__ = ["NO_LABEL", "read_images"]

NO_LABEL = -1
"""In place of a class number; losses and metrics refuse it."""


def read_images(argument: str, settings: DataSettings) -> RawData:
    """Read every image in a folder and in what is inside of it.

    There are no classes: the images can calibrate a quantization, or be answered by a teacher.

    Raises:
        DataError: there is no image, one cannot be read (``on_bad_image``), or they differ in size.
    """
    root = data_folder(argument, "images")
    files = image_files(root)
    if not files:
        raise DataError("there is no image in it", where=str(root))
    decoder = Decoder(settings.image_size, settings.channels or 3, settings.crop_fraction)
    store, kept = decode_all([(file, str(file)) for file in files], decoder, settings.on_bad_image)
    split = RawSplit(store, torch.full((len(kept),), NO_LABEL))
    return RawData(split, split, None, [], files_digest(files))
