"""What a task gives a report to draw: plain JSON of five kinds, so that the page needs no task.

A table, a matrix of counts (a confusion matrix), lines (precision over recall), samples (images
with boxes, or texts) side by side for some variants, and a gallery of images with a line each.
``report.json`` keeps them under ``drawings``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from slimkit.errors import InputError

__all__ = ["Drawing", "change", "gallery", "lines", "matrix", "picture", "samples", "table"]

Drawing = Mapping[str, Any]
"""JSON-able, with ``kind`` and ``title``."""


Cell = str | float | Mapping[str, Any]
"""Of a table: a text, a number, or what :func:`change` gives."""


def change(difference: float, *, higher_is_better: bool = True, digits: int = 2) -> dict[str, Any]:
    """A cell that is written with its sign and in the colour of better or of worse.

    Args:
        difference: now − before.
        higher_is_better: whether more of it is better.
        digits: behind the point.
    """
    return {"change": float(difference), "up": higher_is_better, "digits": digits}


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, note: str = ""
) -> Drawing:
    """Rows under a heading, such as the average precision of each class.

    Args:
        title: of the drawing.
        columns: one per cell of a row.
        rows: texts stand as they are, numbers are written with three digits, changes of
            :func:`change` with their sign.
        note: a sentence below it.
    """
    wrong = next((n for n, row in enumerate(rows) if len(row) != len(columns)), None)
    if wrong is not None:
        raise InputError(
            f"row {wrong} has {len(rows[wrong])} cells for {len(columns)} columns", where="rows"
        )
    return {
        "kind": "table",
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
    }


def matrix(
    title: str,
    labels: Sequence[str],
    counts: Sequence[Sequence[int]],
    *,
    rows: str,
    columns: str,
    note: str = "",
) -> Drawing:
    """A square of counts, such as a confusion matrix: what is off the diagonal stands out.

    Args:
        title: of the drawing.
        labels: of the rows and of the columns.
        counts: one row per label, one count per label.
        rows: what a row is.
        columns: what a column is.
        note: a sentence below it.
    """
    if len(counts) != len(labels) or any(len(row) != len(labels) for row in counts):
        raise InputError(f"expected {len(labels)}×{len(labels)} counts", where="counts")
    return {
        "kind": "matrix",
        "title": title,
        "labels": [str(label) for label in labels],
        "counts": [[int(count) for count in row] for row in counts],
        "rows": rows,
        "columns": columns,
        "note": note,
    }


def lines(
    title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> Drawing:
    """Curves over one axis, such as precision over recall.

    Args:
        title: of the drawing.
        x: what the horizontal axis is.
        y: what the vertical axis is.
        series: name of a curve → its points (x, y).
    """
    return {
        "kind": "lines",
        "title": title,
        "x": x,
        "y": y,
        "series": [
            {"name": name, "points": [[float(a), float(b)] for a, b in points]}
            for name, points in series.items()
        ],
    }


def samples(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Mapping[str, Any]]],
    *,
    note: str = "",
) -> Drawing:
    """Samples one below the other, each as the columns (variants, or the truth) see it.

    Args:
        title: of the drawing.
        columns: names of variants.
        rows: per sample one mapping per column: ``text``, or ``image`` (of :func:`picture`) with
            ``boxes`` (each ``{"box": [x1, y1, x2, y2], "label": text}`` in pixels), or both.
        note: a sentence below them.
    """
    return {
        "kind": "samples",
        "title": title,
        "columns": list(columns),
        "rows": [[dict(cell) for cell in row] for row in rows],
        "note": note,
    }


def gallery(title: str, cells: Sequence[Mapping[str, Any]], *, note: str = "") -> Drawing:
    """Images beside each other, each with a line of text.

    Args:
        title: of the drawing.
        cells: per image ``image`` (of :func:`picture`), ``text``, ``note`` (a second line) and,
            where the text tells a change, ``better``: true or false.
        note: a sentence below them, or instead of them.
    """
    return {
        "kind": "gallery",
        "title": title,
        "cells": [dict(cell) for cell in cells],
        "note": note,
    }


def picture(image: Tensor) -> dict[str, Any]:
    """An image for :func:`samples`, embedded as PNG.

    Args:
        image: (C, H, W) with one or three channels, floats in 0 … 1 or uint8.

    Returns:
        ``{"data": "data:image/png;base64,…", "width": W, "height": H}``.
    """
    from PIL import Image

    if image.dim() != 3 or image.shape[0] not in {1, 3}:
        raise InputError(f"expected (1 or 3, H, W), got {tuple(image.shape)}", where="image")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels.clamp(0, 1) * 255).round()
    array = pixels.byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "data": f"data:image/png;base64,{data}",
        "width": image.shape[2],
        "height": image.shape[1],
    }
