"""Image-classification data: where it comes from, how it is split, batched and augmented."""

from __future__ import annotations

from slimkit.tasks.data.loaders import ArrayLoader
from slimkit.tasks.data.loading import ImageSplits, load_data, synthetic_data
from slimkit.tasks.data.settings import AugmentSettings, DataSettings
from slimkit.tasks.data.sources import SOURCES

__all__ = [
    "SOURCES",
    "ArrayLoader",
    "AugmentSettings",
    "DataSettings",
    "ImageSplits",
    "load_data",
    "synthetic_data",
]
