"""Which variant a report proposes to deploy."""

from __future__ import annotations

from typing import Any

import pytest

from slimkit.recipe.deploy_choice import choose_variant
from slimkit.recipe.schema.recipe import RequireSettings
from slimkit.tasks.interface import Metric

ACCURACY = Metric("accuracy", "accuracy")


def _variant(name: str, accuracy: float, ms: float | None, size: int = 100) -> dict[str, Any]:
    latency = [] if ms is None else [{"median_ms": ms}]
    return {
        "name": name,
        "metrics": {"accuracy": accuracy},
        "cost": {"bytes": size},
        "latency": latency,
        "parity": {},
    }


def _chosen(*variants: dict[str, Any], **require: float) -> dict[str, Any]:
    return choose_variant(variants, RequireSettings(**require), ACCURACY)  # type: ignore[arg-type]


BASE = _variant("base", 99.0, 2.0)


def test_the_fastest_that_meets_every_gate_is_proposed() -> None:
    found = _chosen(
        BASE, _variant("fast", 98.5, 1.0), _variant("fastest", 97.0, 0.5), accuracy_drop=1.0
    )
    assert found["variant"] == "fast"
    assert found["why"] == "the fastest of 2 that meet every gate"
    assert "accuracy_drop is 2" in found["left_out"]["fastest"]


def test_without_a_gate_a_point_may_be_lost() -> None:
    found = _chosen(BASE, _variant("near", 98.1, 1.0), _variant("far", 97.9, 0.5))
    assert found["variant"] == "near"
    assert "lose at most 1 points of accuracy" in found["why"]
    assert list(found["left_out"]) == ["far"]


def test_of_equally_fast_ones_the_smaller_is_proposed() -> None:
    found = _chosen(BASE, _variant("a", 99, 1.0, 90), _variant("b", 99, 1.01, 30))
    assert found["variant"] == "b"


def test_a_slower_variant_is_not_proposed_for_being_last() -> None:
    assert _chosen(BASE, _variant("slow", 99.5, 2.2, 10))["variant"] == "base"


def test_none_fits_or_nothing_was_timed() -> None:
    found = _chosen(BASE, _variant("a", 98.9, 1.0, 50), bytes_ratio=0.2)
    assert found["variant"] is None
    assert found["why"].startswith("no variant meets every gate")
    assert set(found["left_out"]) == {"base", "a"}
    untimed = [_variant("base", 99, None), _variant("a", 99, None, 50)]
    assert _chosen(*untimed)["why"].startswith("the smallest of 2")


@pytest.mark.parametrize(("value", "chosen"), [(1.005, "b"), (1.2, "base")])
def test_of_an_error_less_is_better(value: float, chosen: str) -> None:
    error = Metric("rmse", "RMSE", unit="", higher_is_better=False, high=None)
    rows = [_variant("base", 0, 2.0), _variant("b", 0, 1.0)]
    for row, score in zip(rows, (1.0, value), strict=True):
        row["metrics"] = {"rmse": score}
    assert choose_variant(rows, RequireSettings(), error)["variant"] == chosen
