from __future__ import annotations

import numpy as np
import pytest
import torch

from slimkit.errors import InputError
from slimkit.quantize.observers import (
    OBSERVERS,
    MinMax,
    MovingAverage,
    Percentile,
)
from slimkit.quantize.targets import NumberFormat


def test_minmax_keeps_the_extremes_of_all_batches() -> None:
    observer = MinMax()
    for batch in ([1.0, 2.0], [-3.0, 0.5], [0.0, 1.5]):
        observer.update(torch.tensor(batch))
    assert [float(v) for v in observer.range()] == [-3.0, 2.0]


def test_moving_average_by_hand() -> None:
    observer = MovingAverage(momentum=0.25)
    observer.update(torch.tensor([0.0, 8.0]))
    observer.update(torch.tensor([-4.0, 4.0]))
    # low: 0 + 0.25·(−4 − 0) = −1; high: 8 + 0.25·(4 − 8) = 7
    assert [float(v) for v in observer.range()] == [-1.0, 7.0]


def test_percentile_agrees_with_numpy_over_growing_batches() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(0, scale, 5000) for scale in (0.1, 1.0, 4.0)]
    observer = Percentile(percentile=99.0, bins=8192)
    for batch in batches:
        observer.update(torch.tensor(batch, dtype=torch.float32))
    low, high = (float(v) for v in observer.range())
    everything = np.concatenate(batches)
    width = 2 * np.abs(everything).max() / 8192 * 2
    assert low == pytest.approx(np.percentile(everything, 1.0), abs=width)
    assert high == pytest.approx(np.percentile(everything, 99.0), abs=width)


def test_percentile_of_all_is_the_range_and_after_relu_starts_at_zero() -> None:
    x = torch.randn(10_000).relu()
    whole, inner = Percentile(100.0), Percentile(99.9)
    whole.update(x)
    inner.update(x)
    assert [float(v) for v in whole.range()] == [0.0, float(x.max())]
    low, high = inner.range()
    assert float(low) == 0.0
    assert 0 < float(high) < float(x.max())


def test_memory_of_the_percentile_histogram_does_not_grow() -> None:
    observer = Percentile(bins=64)
    for exponent in range(0, 30, 3):
        observer.update(torch.linspace(-(2.0**exponent), 2.0**exponent, 101))
    assert observer._counts.numel() == 64
    assert observer._counts.sum() == 10 * 101


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_an_observer_without_data_says_so(name: str) -> None:
    with pytest.raises(InputError, match="not seen any data"):
        OBSERVERS.get(name)().range()


@pytest.mark.parametrize(
    "make",
    [
        lambda: MovingAverage(momentum=0.0),
        lambda: Percentile(percentile=40.0),
        lambda: Percentile(bins=7),
        lambda: NumberFormat(9),
    ],
)
def test_settings_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(InputError):
        make()  # type: ignore[operator]
