from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slimkit.errors import InputError
from slimkit.quantize import KL, MSE
from slimkit.quantize.observers.ranges import (
    OBSERVERS,
    MeanOfMaxima,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    describe_observer,
    new_observer,
)
from slimkit.quantize.targets import NumberFormat

UINT8 = NumberFormat(8)
INT8 = NumberFormat(8, signed=True, symmetric=True)
FORMS = [UINT8, INT8, NumberFormat(4), NumberFormat(3, signed=True), NumberFormat(8, False, True)]

Batches = list[list[float]]


def observed(observer: Observer, batches: Batches, form: NumberFormat = UINT8) -> list[float]:
    for batch in batches:
        observer.update(torch.tensor(batch))
    return [float(end) for end in observer.range(form)]


def test_minmax_keeps_the_extremes_of_all_batches() -> None:
    assert observed(MinMax(), [[1.0, 2.0], [-3.0, 0.5], [0.0, 1.5]]) == [-3.0, 2.0]


def test_moving_average_by_hand() -> None:
    # low: 0 + 0.25·(−4 − 0) = −1; high: 8 + 0.25·(4 − 8) = 7
    assert observed(MovingAverage(momentum=0.25), [[0.0, 8.0], [-4.0, 4.0]]) == [-1.0, 7.0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_mean_of_maxima_by_hand_in_any_order_whatever_the_size(order: tuple[int, ...]) -> None:
    batches = [[0.0, 9.0], [-3.0, 1.0, 2.0, 3.0], [-1.5, 0.0, 1.5]]
    found = observed(MeanOfMaxima(), [batches[i] for i in order])
    assert found == pytest.approx([(0.0 - 3.0 - 1.5) / 3, (9.0 + 3.0 + 1.5) / 3])


def test_percentile_agrees_with_numpy_over_growing_batches() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(0, scale, 5000) for scale in (0.1, 1.0, 4.0)]
    low, high = observed(Percentile(percentile=99.0), [batch.tolist() for batch in batches])
    everything = np.concatenate(batches)
    width = 2 * np.abs(everything).max() / 8192 * 2
    assert low == pytest.approx(np.percentile(everything, 1.0), abs=width)
    assert high == pytest.approx(np.percentile(everything, 99.0), abs=width)


def test_percentile_of_all_is_the_range_and_after_relu_starts_at_zero() -> None:
    x = torch.randn(10_000).relu()
    assert observed(Percentile(100.0), [x.tolist()]) == [0.0, float(x.max())]
    low, high = observed(Percentile(99.9), [x.tolist()])
    assert low == 0.0
    assert 0 < high < float(x.max())


# --- every observer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_an_observer_without_data_says_so(name: str) -> None:
    with pytest.raises(InputError, match="not seen any data"):
        OBSERVERS.get(name)().range(UINT8)


@pytest.mark.parametrize("name", OBSERVERS.names())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_finite_shows_in_the_range(name: str, bad: float, first: bool) -> None:
    batches = [[1.0, bad, -1.0], [0.5, 2.0]]
    found = observed(OBSERVERS.get(name)(), batches if first else batches[::-1])
    assert not all(math.isfinite(end) for end in found)


@pytest.mark.parametrize("name", OBSERVERS.names())
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.3, -3.3, 1e-30, 1e30])
def test_constant_values_are_their_own_range(name: str, form: NumberFormat, value: float) -> None:
    found = observed(OBSERVERS.get(name)(), [[value] * 5, [value] * 9], form)
    widened = [min(found[0], 0.0), max(found[1], 0.0)]
    exact = float(torch.tensor(value))
    assert widened == pytest.approx([min(exact, 0.0), max(exact, 0.0)], rel=0.15)


@pytest.mark.parametrize("name", OBSERVERS.names())
@given(
    batches=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), min_size=1, max_size=4
    ),
    form=st.sampled_from(FORMS),
)
def test_a_range_never_exceeds_the_values(name: str, batches: Batches, form: NumberFormat) -> None:
    low, high = observed(OBSERVERS.get(name)(), batches, form)
    everything = [value for batch in batches for value in batch]
    slack = 1e-5 * max(map(abs, everything))  # means are rounded to float32
    assert min(low, 0.0) >= min(*everything, 0.0) - slack
    assert max(high, 0.0) <= max(*everything, 0.0) + slack


@pytest.mark.parametrize("name", ["minmax", "percentile", "kl", "mse"])
def test_order_and_division_into_batches_do_not_matter(name: str) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) ** 3
    whole, pieces = OBSERVERS.get(name)(), OBSERVERS.get(name)()
    whole.update(x.reshape(2, 20, 100))
    for piece in x.sort(descending=True).values.split([1, 999, 3000]):
        pieces.update(piece)
    assert whole.range(UINT8) == pieces.range(UINT8)


# --- a choice of an observer ------------------------------------------------------------------


def test_a_new_observer_has_the_settings_and_has_seen_nothing() -> None:
    template = Percentile(percentile=99.0, bins=64)
    template.update(torch.ones(3))
    fresh = new_observer(template)
    assert isinstance(fresh, Percentile)
    assert (fresh.percentile, fresh.bins) == (99.0, 64)
    with pytest.raises(InputError, match="not seen any data"):
        fresh.range(UINT8)


class Halved:
    """No dataclass, but an observer."""

    def __init__(self) -> None:
        self.largest = torch.tensor(0.0)

    def update(self, x: Tensor) -> None:
        self.largest = torch.maximum(self.largest, x.abs().max() / 2)

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        return -self.largest, self.largest


def test_an_observer_is_described_by_what_is_not_the_default() -> None:
    assert describe_observer("kl") == "kl"
    assert describe_observer(KL()) == "kl"
    assert describe_observer(MSE(bins=1024)) == "mse(bins=1024)"
    assert describe_observer(Percentile(99.9)) == "percentile(percentile=99.9)"
    assert describe_observer(MovingAverage(momentum=0.1)) == "moving_average"
    assert describe_observer(Halved()) == f"{Halved.__module__}:Halved"


def test_observers_of_ones_own_are_copied() -> None:
    template = Halved()
    new_observer(template).update(torch.ones(2))
    assert template.largest == 0.0


@pytest.mark.parametrize("choice", [Percentile, 3, None])
def test_what_is_no_observer_is_refused(choice: Any) -> None:
    with pytest.raises(InputError, match=r"Percentile\(percentile=99.9\)"):
        new_observer(choice)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MovingAverage(momentum=0.0),
        lambda: Percentile(percentile=40.0),
        lambda: Percentile(bins=7),
        lambda: KL(bins=48),
        lambda: MSE(bins=2),
        lambda: NumberFormat(9),
    ],
)
def test_settings_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]
