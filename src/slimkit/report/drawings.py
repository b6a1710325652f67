"""What the task drew, made ready for the page: tables, counts, curves, samples, galleries.

The kinds are those of :mod:`slimkit.tasks.drawing`, which a report knows by their JSON alone. A
drawing that is not of that form is left out: the figures are worth showing without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slimkit.report import words
from slimkit.report.charts import curves
from slimkit.report.reading import Report

__all__ = ["drawn"]

PNG = "data:image/png;base64,"


def drawn(report: Report) -> list[dict[str, Any]]:
    """``kind``, ``title`` and what the page's template needs of each drawing."""
    found = []
    for number, drawing in enumerate(report.drawings):
        prepare = _KINDS.get(str(drawing.get("kind")))
        if prepare is None:
            continue
        try:
            ready = prepare(drawing, f"drawing{number}")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
        title = str(drawing.get("title", ""))
        note = str(drawing.get("note") or "")
        found.append({"kind": drawing["kind"], "title": title, "note": note, **ready})
    return found


def _cell(value: Any) -> dict[str, str]:
    """Text, and ``kind``: whether it is better or worse."""
    if isinstance(value, Mapping) and "change" in value:
        difference, up = float(value["change"]), bool(value.get("up", True))
        text = words.points(difference, int(value.get("digits", 2)))
        kind = "" if text == "±0" else "better" if (difference > 0) == up else "worse"
        return {"text": text, "kind": kind}
    if isinstance(value, float):
        return {"text": f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}", "kind": ""}
    return {"text": words.plain(value), "kind": ""}


def _table(drawing: Mapping[str, Any], _: str) -> dict[str, Any]:
    rows = [[_cell(value) for value in row] for row in drawing["rows"]]
    return {"columns": [str(column) for column in drawing["columns"]], "rows": rows}


def _matrix(drawing: Mapping[str, Any], _: str) -> dict[str, Any]:
    """Counts with how strongly each is tinted: its share of the row, in percent."""
    rows = []
    for place, counts in enumerate(drawing["counts"]):
        total = max(1, sum(int(count) for count in counts))
        cells = []
        for number, count in enumerate(counts):
            share = 100 * int(count) / total
            # a mistake of a few percent must be seen beside a diagonal of nearly all
            tint = 0.0 if not count else 10 + 0.35 * share if number == place else 18 + 0.8 * share
            kind = "right" if number == place else "wrong"
            cells.append({"count": int(count), "tint": round(min(tint, 80)), "kind": kind})
        rows.append({"label": str(drawing["labels"][place]), "cells": cells})
    labels = [str(label) for label in drawing["labels"]]
    names = {"rows_are": str(drawing["rows"]), "columns_are": str(drawing["columns"])}
    return {"labels": labels, "matrix": rows, **names}


def _gallery(drawing: Mapping[str, Any], _: str) -> dict[str, Any]:
    cells = []
    for cell in drawing["cells"]:
        kind = {True: "better", False: "worse"}.get(cell.get("better"), "")
        cells.append({**_sample(cell), "kind": kind, "below": str(cell.get("note", ""))})
    return {"cells": cells}


def _lines(drawing: Mapping[str, Any], name: str) -> dict[str, Any]:
    series = {
        str(row["name"]): [(float(x), float(y)) for x, y in row["points"]]
        for row in drawing["series"]
    }
    return {"svg": curves(series, name=name, x=str(drawing["x"]), y=str(drawing["y"]))}


def _samples(drawing: Mapping[str, Any], _: str) -> dict[str, Any]:
    rows = [[_sample(cell) for cell in row] for row in drawing["rows"]]
    return {"columns": [str(column) for column in drawing["columns"]], "rows": rows}


def _sample(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Text, and an image with its boxes in pixels as x, y, width, height."""
    image = cell.get("image") or {}
    data = str(image.get("data", ""))
    boxes = [str(box.get("label", "")) for box in cell.get("boxes", ())]
    shown: dict[str, Any] = {"text": str(cell.get("text", "")), "data": "", "boxes": []}
    shown["alt"] = f"{len(boxes)} boxes: {', '.join(boxes)}" if boxes else ""
    if not data.startswith(PNG):
        return shown
    width, height = float(image["width"]), float(image["height"])
    shown |= {"data": data, "width": width, "height": height}
    shown["line"], shown["letters"] = max(width, height) / 180, max(width, height) / 20
    for box in cell.get("boxes", ()):
        left, top, right, bottom = (float(edge) for edge in box["box"])
        place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        shown["boxes"].append({**place, "label": str(box.get("label", ""))})
    return shown


_KINDS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "gallery": _gallery,
    "matrix": _matrix,
    "table": _table,
    "lines": _lines,
    "samples": _samples,
}
