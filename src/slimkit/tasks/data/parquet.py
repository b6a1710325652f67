"""``parquet:DIR``: image classification in the layout of Hugging Face data sets.

A folder (or its subfolder ``data``) with ``train*.parquet`` and ``test*.parquet``, perhaps
``validation*.parquet``; a column of images (``{"bytes", "path"}``) and a column of labels.
Class names come from the schema's ``huggingface`` metadata where it has them; labels that are
texts are classes in alphabetical order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import DataError, nearest
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
MOST_CLASSES = 100_000
"""Of labels that are numbers without names: the largest public sets have 21,841 classes."""
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
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(
            f"its columns are others than those of {paths[0].name}: {error}", where=str(paths[-1])
        ) from error


def _features(table: pa.Table) -> dict[str, Any]:
    """The ``features`` that Hugging Face's ``datasets`` writes into the schema, or nothing."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(raw)["info"]["features"] if raw else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _column(table: pa.Table, feature: str, names: tuple[str, ...], where: str) -> str:
    """The column with that feature type, or with one of the usual names."""
    for name, description in _features(table).items():
        if isinstance(description, dict) and description.get("_type") == feature:
            if name not in table.column_names:
                raise DataError(
                    f"its metadata names a column {name!r} that is not there",
                    where=where,
                    hint=f"its columns are: {', '.join(table.column_names)}",
                )
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
    """Names from the metadata, else the sorted texts of the labels, else 0 … the largest."""
    table = tables["train"]
    column = _column(table, "ClassLabel", _LABEL_COLUMNS, where)
    description = _features(table).get(column)
    names = description.get("names") if isinstance(description, dict) else None
    if isinstance(names, list) and names:
        return [str(name) for name in names]
    labels = _labels(table, where)
    if not labels:
        raise DataError("the train split is empty", where=where)
    if isinstance(labels[0], str):
        return sorted({str(label) for label in labels})
    largest = max(int(label) for label in labels)
    if largest >= MOST_CLASSES:
        raise DataError(
            f"the label {largest} in column {column!r} would mean as many classes",
            where=where,
            hint=f"labels are 0, 1, 2, … below {MOST_CLASSES}, or texts",
        )
    return [str(label) for label in range(largest + 1)]


def _labels(table: pa.Table, where: str) -> list[int | str]:
    """The labels as they are written: all whole numbers, or all texts.

    Raises:
        DataError: a label is missing, or neither.
    """
    name = _column(table, "ClassLabel", _LABEL_COLUMNS, where)
    labels = table[name].to_pylist()
    kind = str if any(isinstance(label, str) for label in labels) else int
    for row, label in enumerate(labels):
        whole = isinstance(label, float) and label.is_integer()
        if not isinstance(label, kind) and not (kind is int and whole):
            shown = "no label" if label is None else f"the label {str(label)[:40]!r}"
            raise DataError(
                f"row {row} has {shown} in column {name!r}",
                where=where,
                hint="labels are all whole numbers from 0, or all texts",
            )
    return [kind(label) for label in labels]


def _numbered(labels: list[int | str], classes: list[str], where: str) -> list[int]:
    """Labels as positions in ``classes``."""
    numbers = {name: number for number, name in enumerate(classes)}
    found: list[int] = []
    for label in labels:
        if isinstance(label, str) and label not in numbers:
            raise DataError(
                f"no image of the train split has the label {label[:40]!r}",
                where=where,
                hint=nearest(label, classes),
            )
        # beyond int64 it is outside anyway
        found.append(numbers[label] if isinstance(label, str) else min(label, 2**62))
    return found


def _decoded(
    table: pa.Table, path: Path, classes: list[str], decoder: Decoder, settings: DataSettings
) -> RawSplit:
    where = str(path)
    column = table[_column(table, "Image", _IMAGE_COLUMNS, where)]
    labels = _numbered(_labels(table, where), classes, where)
    rows = column.to_pylist()
    items: list[tuple[bytes | Path, str]] = []
    for number, row in enumerate(rows):
        data = row.get("bytes") if isinstance(row, dict) else row
        items.append((data if isinstance(data, bytes) else b"", f"{where} row {number}"))
    store, kept = decode_all(items, decoder, settings.on_bad_image)
    return RawSplit(store, checked_labels([labels[row] for row in kept], classes, where))
