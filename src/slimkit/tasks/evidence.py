"""What stands behind a score: answers to single samples, intervals, what changed.

A task keeps of each variant what it needs of the answers to single samples (its *record*, JSON,
taken while the test split is scored) and says of all records together how sure the scores are.
Nothing is computed twice, and a report needs neither the data nor the networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimkit.measure.intervals import LEVEL, paired_difference, wilson
from slimkit.tasks.drawing import Drawing

__all__ = ["Evidence", "Examination", "change_of_share", "interval", "share"]


@dataclass(frozen=True)
class Examination:
    """A test split in one pass.

    Attributes:
        scores: all metrics.
        record: what the task keeps of the single answers, JSON-able; None for nothing.
    """

    scores: Mapping[str, float]
    record: Any = None


@dataclass(frozen=True)
class Evidence:
    """What the records of all variants say.

    Attributes:
        variants: name → ``{"samples": …, "metrics": {metric: interval}, "change": {metric:
            interval}}``, of :func:`share` or :func:`interval`; the first variant has no change.
        drawings: of the first variant against the last, see :mod:`slimkit.tasks.drawing`.
    """

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drawings: Sequence[Drawing] = ()


def interval(low: float, high: float, method: str, **more: Any) -> dict[str, Any]:
    """An interval as ``report.json`` has it, in the unit of the metric.

    Args:
        low: lower limit at the level of 95 %.
        high: upper limit.
        method: how it was found.
        more: counts behind it.
    """
    limits = {"low": round(low, 4), "high": round(high, 4), "level": LEVEL}
    return {**limits, "method": method, **more}


def share(right: Sequence[bool]) -> dict[str, Any]:
    """A percentage with its counts: Wilson's interval."""
    low, high = wilson(sum(right), len(right))
    counts = {"right": sum(right), "of": len(right)}
    return interval(100 * low, 100 * high, "Wilson's score", **counts)


def change_of_share(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    """The change of a percentage on the same samples, with those that changed counted."""
    pairs = list(zip(before, after, strict=True))
    won = sum(now and not then for then, now in pairs)
    lost = sum(then and not now for then, now in pairs)
    low, high = paired_difference(won, lost, len(pairs))
    method = "paired, Bonett and Price"
    return interval(100 * low, 100 * high, method, won=won, lost=lost, of=len(pairs))
