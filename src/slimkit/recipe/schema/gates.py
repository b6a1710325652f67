"""``require:``: what the last variant must keep of the first one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slimkit.recipe.schema.recipe import RequireSettings
from slimkit.tasks.interface import Metric

__all__ = ["check_gates", "missed_text"]

VariantFigures = Mapping[str, Any]
AT_LEAST = {"min_accuracy", "sqnr_db", "top1_agreement", "integer_convs"}


def check_gates(
    require: RequireSettings, first: VariantFigures, last: VariantFigures, metric: Metric
) -> list[dict[str, Any]]:
    """Every gate of the recipe with its measured value.

    Args:
        require: the recipe's limits.
        first: the baseline's entry in the report.
        last: the final variant's.
        metric: that decides, for ``metric_drop`` and ``min_metric``.

    Returns:
        ``{"name", "limit", "value", "bound", "passed"}`` for each limit that is set, where
        ``bound`` is "at least" or "at most". A value that was not measured is None and has not
        passed.
    """
    at_least = AT_LEAST | ({"min_metric"} if metric.higher_is_better else set())
    gates = []
    for name in RequireSettings.model_fields:
        limit = getattr(require, name)
        if limit is None:
            continue
        value = _of_metric(name, first, last, metric)
        if name in _VALUES:
            value = _VALUES[name](first, last)
        bound = "at least" if name in at_least else "at most"
        passed = value is not None and (value >= limit if name in at_least else value <= limit)
        gates.append(
            {"name": name, "limit": limit, "value": value, "bound": bound, "passed": passed}
        )
    return gates


def missed_text(gates: list[dict[str, Any]]) -> str:
    """The missed gates in one line; empty if all hold."""
    told = []
    for gate in gates:
        if gate["passed"]:
            continue
        value = "not measured" if gate["value"] is None else f"{gate['value']:.4g}"
        told.append(f"{gate['name']} is {value}, required is {gate['bound']} {gate['limit']:g}")
    return "; ".join(told)


def _of_metric(
    name: str, first: VariantFigures, last: VariantFigures, metric: Metric
) -> float | None:
    """The metric of the last variant, or how much worse it is than that of the first."""
    now, before = last["metrics"].get(metric.name), first["metrics"].get(metric.name)
    if now is None or name == "min_metric":
        return None if now is None else float(now)
    return None if before is None else metric.goodness(before) - metric.goodness(now)


def _accuracy_drop(first: VariantFigures, last: VariantFigures) -> float | None:
    return float(first["metrics"]["accuracy"] - last["metrics"]["accuracy"])


def _cost_ratio(name: str) -> Callable[[VariantFigures, VariantFigures], float | None]:
    def ratio(first: VariantFigures, last: VariantFigures) -> float | None:
        return float(last["cost"][name] / first["cost"][name])

    return ratio


def _latency_ratio(first: VariantFigures, last: VariantFigures) -> float | None:
    if not first["latency"] or not last["latency"]:
        return None
    return float(last["latency"][0]["median_ms"] / first["latency"][0]["median_ms"])


def _parity(name: str) -> Callable[[VariantFigures, VariantFigures], float | None]:
    def value(_: VariantFigures, last: VariantFigures) -> float | None:
        found = last["parity"].get(name)
        return None if found is None else float(found)

    return value


def _integer_convs(_: VariantFigures, last: VariantFigures) -> float | None:
    fusion = last.get("fusion") or {}
    return fusion["integer_convs"] / fusion["convs"] if fusion.get("convs") else None


_VALUES: dict[str, Callable[[VariantFigures, VariantFigures], float | None]] = {
    "accuracy_drop": _accuracy_drop,
    "min_accuracy": lambda _, last: float(last["metrics"]["accuracy"]),
    "bytes_ratio": _cost_ratio("bytes"),
    "latency_ratio": _latency_ratio,
    "params_ratio": _cost_ratio("params"),
    "macs_ratio": _cost_ratio("macs"),
    "sqnr_db": _parity("sqnr_db"),
    "top1_agreement": _parity("top1_agreement"),
    "max_abs_diff": _parity("max_abs_diff"),
    "integer_convs": _integer_convs,
}
