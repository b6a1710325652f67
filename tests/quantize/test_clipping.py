"""KL and MSE against slow references that follow the definitions value by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimkit.quantize.observers.clipping import KL, MSE, divergences, squared_errors
from slimkit.quantize.scales import affine_parameters
from slimkit.quantize.targets import NumberFormat
from slimkit.runtime.fake_quantize import fake_quantize

UINT8, UINT4 = NumberFormat(8), NumberFormat(4)
INT8, INT4 = NumberFormat(8, True, True), NumberFormat(4, True, True)


def sample(kind: str, size: int = 20_000, seed: int = 0) -> Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    heavy = x * x.abs() * 2
    return {
        "normal": x,
        "relu": heavy.relu(),
        "heavy": heavy,
        "lopsided": torch.nn.functional.silu(3 * x),
        "away from zero": 3.0 + x.abs(),
    }[kind]


KINDS = ["normal", "relu", "heavy", "lopsided", "away from zero"]


def slow_divergence(counts: list[float], first: int, stop: int, levels: int) -> float:
    """KL of one range: P and Q bin by bin, as the TensorRT talk describes them."""
    size = stop - first
    p = counts[first:stop]
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[stop:])
    q = [0.0] * size
    for level in range(levels):
        bins = [i for i in range(size) if i * levels // size == level]
        mass = sum(counts[first + i] for i in bins)
        clipped = sum(p[i] for i in bins) > mass
        filled = [i for i in bins if p[i] > 0]
        for i in filled:
            q[i] = (max(mass, 1.0) if clipped else mass) / len(filled)
    total_p, total_q = sum(p), sum(q)
    return sum(
        a / total_p * math.log(a / total_p / (b / total_q))
        for a, b in zip(p, q, strict=True)
        if a > 0
    )


@settings(max_examples=60)
@given(data=st.data())
def test_divergences_agree_with_the_definition(data: st.DataObject) -> None:
    count = st.one_of(st.just(0), st.integers(0, 50))
    counts = data.draw(st.lists(count, min_size=24, max_size=24).filter(lambda c: sum(c) > 0))
    levels = data.draw(st.integers(2, 8))
    first = data.draw(st.integers(0, 24 - levels))
    stop = data.draw(st.integers(first + levels, 24))
    found = divergences(
        torch.tensor(counts).double(), torch.tensor([first]), torch.tensor([stop]), levels
    )
    expected = slow_divergence([float(c) for c in counts], first, stop, levels)
    assert found.item() == pytest.approx(expected, abs=1e-9)
    assert found.item() >= -1e-9


def slow_kl_range(x: np.ndarray, bins: int, form: NumberFormat) -> tuple[float, float]:
    """All thresholds of a histogram around zero, tried one after the other."""
    half = bins // 2
    limit = 2.0 ** (math.floor(math.log2(np.abs(x).max())) + 1)
    raw, _ = np.histogram(x, bins=bins, range=(-limit, limit))
    counts = [float(c) for c in raw]
    beside = max(counts[half - 1], counts[half + 1])
    counts[half] = min(counts[half], beside) if beside else counts[half]
    levels = form.qmax - form.qmin + 1
    used = [i for i in range(bins) if raw[i]]
    most_below, most_above = max(half - min(used), 0), max(max(used) + 1 - half, 0)
    if form.symmetric:
        most_below = most_above = max(most_below, most_above)
    best, smallest = math.inf, math.inf
    for threshold in range(1, max(most_below, most_above) + 1):
        first, stop = half - min(threshold, most_below), half + min(threshold, most_above)
        if stop - first < levels or 2 * raw[first:stop].sum() < raw.sum():
            continue
        loss = slow_divergence(counts.copy(), first, stop, levels)
        if loss < smallest:
            best, smallest = threshold * limit / half, loss
    return max(x.min(), -best), min(x.max(), best)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [UINT4, INT4], ids=str)
def test_kl_finds_the_threshold_that_a_slow_search_finds(kind: str, form: NumberFormat) -> None:
    x = sample(kind)
    observer = KL(bins=256)
    for batch in x.split(3000):
        observer.update(batch)
    found = [float(end) for end in observer.range(form)]
    assert found == pytest.approx(slow_kl_range(x.numpy().astype(np.float64), 256, form))


def test_kl_cuts_a_long_tail_and_keeps_a_bounded_distribution() -> None:
    tail, flat = KL(), KL()
    tail.update(sample("heavy", 200_000))
    flat.update(torch.linspace(-1.0, 1.0, 200_000))
    assert float(tail.range(INT8)[1]) < 0.8 * sample("heavy", 200_000).abs().max()
    assert [float(end) for end in flat.range(INT8)] == pytest.approx([-1.0, 1.0], abs=0.01)


def test_zeros_of_a_relu_do_not_change_the_threshold_of_kl() -> None:
    x = sample("relu", 100_000)
    few, many = KL(), KL()
    few.update(x)
    many.update(torch.cat([x, torch.zeros(500_000)]))
    assert few.range(UINT8) == many.range(UINT8)


def sampled_error(x: Tensor, low: float, high: float, form: NumberFormat) -> float:
    """The mean squared error of the very rounding that the network will do."""
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), form)
    rounded = fake_quantize(x, scale, zero_point, qmin=form.qmin, qmax=form.qmax)
    return float((rounded.double() - x.double()).square().mean())


@pytest.mark.parametrize("form", [UINT8, INT8, UINT4, NumberFormat(8, False, True)], ids=str)
def test_squared_errors_are_those_of_values_spread_evenly_in_the_bins(form: NumberFormat) -> None:
    counts = torch.tensor([3.0, 0.0, 2.0, 7.0, 1.0, 4.0]).double()
    edges = torch.arange(-3, 4).double() * 0.25
    spread = (torch.arange(20_000).double() + 0.5) / 20_000 * 0.25
    values = edges[:-1, None] + spread
    lows, highs = torch.tensor([-0.75, -0.5, 0.0, -0.1]), torch.tensor([0.75, 0.3, 0.4, 0.0])
    scales, zero_points = affine_parameters(lows, highs, form)
    found = squared_errors(edges, counts, scales, zero_points, form)
    for error, scale, zero_point in zip(found, scales, zero_points, strict=True):
        levels = (values / scale.double()).round() + zero_point
        rounded = (levels.clamp(form.qmin, form.qmax) - zero_point) * scale.double()
        expected = (rounded - values).square().mean(1) @ counts / counts.sum()
        assert float(error) == pytest.approx(float(expected), rel=1e-4)


def slow_mse(x: Tensor, form: NumberFormat, steps: int) -> float:
    """The smallest error over a dense grid of ranges."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if form.symmetric:
        largest = max(-low, high)
        ranges = [(-largest * i / steps, largest * i / steps) for i in range(1, steps + 1)]
    else:
        ends = range(steps + 1)
        lows = sorted({low * i / steps for i in ends})
        ranges = [(a, high * i / steps) for a in lows for i in ends if a or i]
    return min(sampled_error(x, a, b, form) for a, b in ranges)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [UINT8, INT8, UINT4, INT4, NumberFormat(2)], ids=str)
def test_mse_is_as_good_as_the_best_of_a_dense_grid(kind: str, form: NumberFormat) -> None:
    x = sample(kind, 5000)
    observer = MSE()
    for batch in x.split(999):
        observer.update(batch)
    low, high = (float(end) for end in observer.range(form))
    assert sampled_error(x, low, high, form) <= 1.02 * slow_mse(x, form, steps=40)


def test_mse_searches_both_ends_of_an_asymmetric_range() -> None:
    x = torch.cat([sample("normal"), torch.tensor([-20.0, 9.0])])
    observer = MSE()
    observer.update(x)
    low, high = (float(end) for end in observer.range(UINT4))
    assert -6.0 < low < -2.0 < 2.0 < high < 6.0


@pytest.mark.parametrize("observer", [KL(), MSE()], ids=["kl", "mse"])
@pytest.mark.parametrize("form", [UINT8, INT8, UINT4], ids=str)
def test_one_huge_outlier_among_many_small_values_is_cut(
    observer: KL | MSE, form: NumberFormat
) -> None:
    observer.update(torch.cat([sample("relu", 200_000), torch.tensor([300.0])]))
    low, high = (float(end) for end in observer.range(form))
    assert low == 0.0
    assert 1.0 < high < 300.0


@pytest.mark.parametrize("observer", [KL(), MSE()], ids=["kl", "mse"])
def test_one_observer_answers_for_every_format(observer: KL | MSE) -> None:
    observer.update(sample("normal"))
    eight, four = observer.range(UINT8), observer.range(UINT4)
    assert four[1] - four[0] < eight[1] - eight[0]
    assert observer.range(UINT8) == eight
