"""Formatting of numbers in reports: units, signs, ratios; one way for page and terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

__all__ = [
    "change",
    "count",
    "decibels",
    "duration",
    "factor",
    "flat",
    "heading",
    "limits",
    "link",
    "milliseconds",
    "plain",
    "points",
    "score",
    "size",
]

MINUS = "−"
"""U+2212, as wide as a digit."""
NARROW = "\u202f"
"""Narrow no-break space, between a number and its unit."""


def _significant(value: float, digits: int = 3) -> str:
    """``value`` with three significant digits and no exponent: 0.0123, 1.23, 12.3, 123."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{min(decimals, 6)}f}"


def _scaled(value: float, units: Sequence[str], step: float) -> str:
    scaled = float(value)
    unit = 0
    while abs(scaled) >= 0.9995 * step and unit < len(units) - 1:
        scaled /= step
        unit += 1
    text = _significant(scaled) if unit else f"{scaled:.0f}"
    return f"{text}{NARROW}{units[unit]}" if units[unit] else text


def count(value: float | None) -> str:
    """Parameters or MACs: ``272 k``, ``41.2 M``."""
    return "–" if value is None else _scaled(value, ("", "k", "M", "G", "T"), 1000.0)


def size(value: float | None) -> str:
    """Bytes in powers of 1000: ``98.4 kB``."""
    return "–" if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB"), 1000.0)


def milliseconds(value: float | None) -> str:
    """A latency in ms: ``0.412 ms``."""
    return "–" if value is None else f"{_significant(value)}{NARROW}ms"


def decibels(value: float | None, *, exact: bool) -> str:
    """A ratio of signal to noise: ``38 dB``; ``exact`` where there is no noise."""
    if exact:
        return "exact"
    return "–" if value is None else f"{value:.0f}{NARROW}dB"


def duration(seconds: float | None) -> str:
    """How long something took: ``0.4 s``, ``52 s``, ``12 min``, ``3.1 h``."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f}{NARROW}s" if seconds < 10 else f"{seconds:.0f}{NARROW}s"
    minutes = seconds / 60
    return f"{minutes:.0f}{NARROW}min" if minutes < 100 else f"{minutes / 60:.1f}{NARROW}h"


def limits(low: float, high: float, digits: int = 2, *, signed: bool = False) -> str:
    """An interval: ``97.60 … 99.49``; of a difference with signs: ``−1.07 … +0.67``."""
    if not signed:
        return f"{low:.{digits}f} … {high:.{digits}f}"
    return " … ".join(points(end, digits).replace("±0", "0") for end in (low, high))


def heading(text: str) -> str:
    """``text`` with a capital in front; ``mAP`` and ``mIoU`` stay what they are."""
    first = text.split(" ", 1)[0]
    return text if first != first.lower() else text[:1].upper() + text[1:]


def score(value: float | None, digits: int = 2) -> str:
    """Accuracy, mAP or mIoU in percent with two decimals: ``98.89``."""
    return "–" if value is None else f"{value:.{digits}f}"


def points(difference: float | None, digits: int = 2) -> str:
    """A difference of two scores, such as percentage points, with its sign: ``−0.19``."""
    if difference is None:
        return ""
    rounded = round(difference, digits)
    if rounded == 0:
        return "±0"
    return f"{'+' if rounded > 0 else MINUS}{abs(rounded):.{digits}f}"


def change(value: float | None, baseline: float | None) -> str:
    """The relative change of a cost in percent: ``−76.3 %``; empty when there is no baseline."""
    if value is None or not baseline:
        return ""
    percent = 100.0 * (value / baseline - 1.0)
    if abs(percent) < 0.05:
        return "±0"
    return f"{'+' if percent > 0 else MINUS}{abs(percent):.1f}{NARROW}%"


def factor(value: float | None, baseline: float | None, less: str, more: str) -> str:
    """A ratio in words: ``4.2× smaller``, or ``1.1× larger``; empty when it is unknown.

    Args:
        value: the cost now.
        baseline: the cost before.
        less: the word when ``value`` is below ``baseline``.
        more: the word when it is above.
    """
    if not value or not baseline:
        return ""
    ratio, word = (baseline / value, less) if value <= baseline else (value / baseline, more)
    text = f"{ratio:.1f}" if ratio < 99.95 else f"{ratio:.0f}"
    return f"no {less}" if text == "1.0" else f"{text}× {word}"


def plain(value: Any) -> str:
    """A setting as a person writes it in a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)


def link(path: str) -> str:
    """The address of a file of the run for the page beside it; empty for anything else.

    A link has no scheme (``javascript:``), is not absolute and does not leave the folder.
    """
    parts = path.split("/")
    odd = not path.isprintable() or any(sign in path for sign in ":\\")
    if odd or path.startswith("/") or ".." in parts or not any(parts):
        return ""
    return quote(path)


def age(seconds: float) -> str:
    """``"3 days"``, ``"5 hours"``, ``"12 min"``: how long ago something was."""
    for length, unit in ((86_400, "day"), (3_600, "hour")):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s'[: number > 1]}"
    return f"{int(seconds // 60)} min"


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"distill.0.weight": 1.0}``, in the recipe's own path syntax."""
    result: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{prefix}{key}"
        nested: Any = item
        if isinstance(item, list) and any(isinstance(part, Mapping) for part in item):
            nested = {str(number): part for number, part in enumerate(item)}
        if isinstance(nested, Mapping) and nested:
            result.update(flat(nested, f"{path}."))
        else:
            result[path] = item
    return result
