"""What the task drew, made ready for the page: tables, curves, samples side by side.

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
        found.append({"kind": drawing["kind"], "title": title, **ready})
    return found


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return words.plain(value)


def _table(drawing: Mapping[str, Any], _: str) -> dict[str, Any]:
    rows = [[_cell(value) for value in row] for row in drawing["rows"]]
    return {"columns": [str(column) for column in drawing["columns"]], "rows": rows}


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
    shown: dict[str, Any] = {"text": str(cell.get("text", "")), "data": "", "boxes": []}
    if not data.startswith(PNG):
        return shown
    width, height = float(image["width"]), float(image["height"])
    shown |= {"data": data, "width": width, "height": height}
    shown["line"], shown["letters"] = max(width, height) / 160, max(width, height) / 14
    for box in cell.get("boxes", ()):
        left, top, right, bottom = (float(edge) for edge in box["box"])
        place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        shown["boxes"].append({**place, "label": str(box.get("label", ""))})
    return shown


_KINDS: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "table": _table,
    "lines": _lines,
    "samples": _samples,
}
