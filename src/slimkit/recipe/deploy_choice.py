"""Which variant to deploy, by a rule that the report states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimkit.recipe.schema.gates import check_gates, missed_text
from slimkit.recipe.schema.recipe import RequireSettings
from slimkit.tasks.interface import Metric

__all__ = ["choose_variant"]

_QUALITY_GATES = ("metric_drop", "min_metric", "accuracy_drop", "min_accuracy")
_DROP = 0.01
"""Share of the metric's range (a point of a percentage) that may be lost where no gate says."""
_ALIKE = 1.02
"""Latencies within 2 % are alike: another run may turn them round. The smaller file wins then."""


def choose_variant(
    variants: Sequence[Mapping[str, Any]], require: RequireSettings, metric: Metric
) -> dict[str, Any]:
    """The fastest variant that meets every gate of the recipe; of equals the smallest.

    Without a gate on the quality one point of the metric (a hundredth of its range, or of the
    baseline's value) may be lost.

    Args:
        variants: of the report; the first is the baseline.
        require: the recipe's gates, which are asked of every variant here.
        metric: that decides.

    Returns:
        ``variant`` (None when none fits), ``rule``, ``why``, and ``left_out``: name → the gates
        that it misses.
    """
    first = variants[0]
    limits, assumed = require, ""
    if all(getattr(require, name) is None for name in _QUALITY_GATES):
        drop = _assumed_drop(first, metric)
        limits = require.model_copy(update={"metric_drop": drop})
        unit = " points" if metric.unit == "%" else ""
        assumed = f" and loses at most {drop:.3g}{unit} of {metric.label}"
    left_out: dict[str, str] = {}
    for variant in variants:
        missed = missed_text(check_gates(limits, first, variant, metric))
        if missed:
            left_out[str(variant["name"])] = missed
    fitting = [variant for variant in variants if variant["name"] not in left_out]
    gates = any(getattr(require, name) is not None for name in RequireSettings.model_fields)
    meets = "meets every gate" if gates else ""
    asked = (meets + assumed).removeprefix(" and ")
    if not fitting:
        why = f"no variant {asked}"
        return {"variant": None, "rule": asked, "why": why, "left_out": left_out}
    timed = all(variant["latency"] for variant in fitting)
    best = min(fitting, key=lambda variant: _rank(variant, fitting, timed=timed))
    kind = "fastest" if timed else "smallest"
    others = f"the {kind} of {len(fitting)} that" if len(fitting) > 1 else "the only one that"
    why = f"{others} {asked}" if len(fitting) == 1 else f"{others} {_plural(asked)}"
    return {"variant": best["name"], "rule": asked, "why": why, "left_out": left_out}


def _plural(text: str) -> str:
    return text.replace("meets", "meet").replace("loses", "lose")


def _rank(
    variant: Mapping[str, Any], fitting: Sequence[Mapping[str, Any]], *, timed: bool
) -> tuple[float, float]:
    if not timed:
        return 0.0, variant["cost"]["bytes"]
    best = min(other["latency"][0]["median_ms"] for other in fitting)
    time = variant["latency"][0]["median_ms"]
    return (0.0 if time <= _ALIKE * best else time), variant["cost"]["bytes"]


def _assumed_drop(first: Mapping[str, Any], metric: Metric) -> float:
    if metric.low is not None and metric.high is not None:
        return _DROP * (metric.high - metric.low)
    return _DROP * abs(float(first["metrics"].get(metric.name, 0.0)))
