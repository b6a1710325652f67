"""How sure a score and its change are, as ``report.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Interval", "read_intervals"]


@dataclass(frozen=True)
class Interval:
    """Limits at the level of 95 %, with the counts behind them where there are any.

    Attributes:
        low, high: in the metric's unit.
        method: how they were found.
        right, of: samples that count, of all.
        won, lost: samples that only this variant, or only the first one, has right.
    """

    low: float
    high: float
    method: str = ""
    right: int | None = None
    of: int | None = None
    won: int | None = None
    lost: int | None = None

    @property
    def holds_zero(self) -> bool:
        """Whether a change is within the error of the measurement."""
        return self.low <= 0 <= self.high


def read_intervals(value: Any) -> dict[str, Interval]:
    """Name of a metric → its interval; empty where nothing is known.

    Raises:
        TypeError, ValueError: a limit is no number.
    """
    if not isinstance(value, Mapping):
        return {}
    found = {}
    for name, entry in value.items():
        if not isinstance(entry, Mapping) or "low" not in entry or "high" not in entry:
            continue
        counts = {
            key: int(entry[key])
            for key in ("right", "of", "won", "lost")
            if entry.get(key) is not None
        }
        limits = float(entry["low"]), float(entry["high"])
        found[str(name)] = Interval(*limits, str(entry.get("method", "")), **counts)
    return found
