"""``parquet:DIR``: image classification in the layout of Hugging Face data sets.

A folder (or its subfolder ``data``) with ``train*.parquet`` and ``test*.parquet``, perhaps
``validation*.parquet``; a column of images (``{"bytes", "path"}``) and a column of labels.
Class names come from the schema's ``huggingface`` metadata where it has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import DataError
from slimkit.tasks.data.settings import DataSettings
from slimkit.tasks.data.sources import (
    RawData,
    RawSplit,
    checked_labels,
    data_folder,
    files_digest,
)
from slimkit.tasks.data.stores import Decoder, decode_all

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["read_parquet"]

_PATTERNS = {
    "train": ("train*.parquet",),
    "validation": ("validation*.parquet", "valid*.parquet", "val*.parquet", "dev*.parquet"),
    "test": ("test*.parquet",),
}
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "target")


def read_parquet(argument: str, settings: DataSettings) -> RawData:
    """Read and decode a folder of Parquet files.

    Raises:
        DataError: the folder, a split or a column is missing, a file is damaged, or an image
            cannot be read (``on_bad_image``).
    """
    folder = data_folder(argument, "parquet")
    files = {split: _files(folder, split) for split in _PATTERNS}
    if not files["test"] and files["validation"]:
        files["test"], files["validation"] = files["validation"], []
    for split in ("train", "test"):
        if not files[split]:
            raise DataError(
                f"there is no {split} split in it",
                where=str(folder),
                hint=f"expected {split}*.parquet, here or in data/",
            )
    tables = {split: _table(paths) for split, paths in files.items() if paths}
    classes = _classes(tables, where=str(folder))
    channels = settings.channels or 3
    decoder = Decoder(settings.image_size, channels, settings.crop_fraction)
    splits = {
        split: _decoded(tables[split], files[split][0], classes, decoder, settings)
        for split in tables
    }
    return RawData(
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        classes=classes,
        digest=files_digest([path for split in sorted(files) for path in files[split]]),
    )


def _files(folder: Path, split: str) -> list[Path]:
    for pattern in _PATTERNS[split]:
        for place in (folder, folder / "data"):
            found = sorted(place.glob(pattern))
            if found:
                return found
    return []


def _table(paths: list[Path]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    tables = []
    for path in paths:
        try:
            tables.append(parquet.read_table(path))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"not a complete Parquet file: {error}", where=str(path)) from error
    return pa.concat_tables(tables)


def _features(table: pa.Table) -> dict[str, Any]:
    """The ``features`` that Hugging Face's ``datasets`` writes into the schema, or nothing."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(raw)["info"]["features"] if raw else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _column(table: pa.Table, feature: str, names: tuple[str, ...], where: str) -> str:
    """The column with that feature type, or with one of the usual names."""
    for name, description in _features(table).items():
        if isinstance(description, dict) and description.get("_type") == feature:
            return name
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(
        f"there is no column {' or '.join(names)}",
        where=where,
        hint=f"its columns are: {', '.join(table.column_names)}",
    )


def _classes(tables: dict[str, pa.Table], where: str) -> list[str]:
    table = tables["train"]
    column = _column(table, "ClassLabel", _LABEL_COLUMNS, where)
    names = _features(table).get(column, {}).get("names")
    if names:
        return [str(name) for name in names]
    import pyarrow.compute as pc

    if not len(table):
        raise DataError("the train split is empty", where=where)
    return [str(label) for label in range(int(pc.max(table[column]).as_py()) + 1)]


def _decoded(
    table: pa.Table, path: Path, classes: list[str], decoder: Decoder, settings: DataSettings
) -> RawSplit:
    where = str(path)
    column = table[_column(table, "Image", _IMAGE_COLUMNS, where)]
    labels = table[_column(table, "ClassLabel", _LABEL_COLUMNS, where)].to_pylist()
    rows = column.to_pylist()
    items: list[tuple[bytes | Path, str]] = []
    for number, row in enumerate(rows):
        data = row.get("bytes") if isinstance(row, dict) else row
        items.append((data if isinstance(data, bytes) else b"", f"{where} row {number}"))
    store, kept = decode_all(items, decoder, settings.on_bad_image)
    return RawSplit(store, checked_labels([labels[row] for row in kept], classes, where))
