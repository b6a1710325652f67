from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimkit.errors import InputError
from slimkit.quantize.observers.histograms import Histogram

Batches = list[list[float]]
VALUES = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
BATCHES = st.lists(st.lists(VALUES, min_size=1, max_size=40), min_size=1, max_size=5)


def filled(batches: Batches, bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(torch.tensor(batch))
    return histogram


def test_counts_by_hand_before_and_after_the_width_doubles() -> None:
    histogram = filled([[0.0, 0.4, 0.6, -0.1, 0.9]], bins=4)
    assert histogram.width == 0.5
    assert histogram.counts.tolist() == [0, 1, 2, 2]
    histogram.add(torch.tensor([1.0, -3.0]))
    assert histogram.width == 2.0  # twice doubled
    assert histogram.counts.tolist() == [1, 1, 5, 0]
    assert (histogram.low, histogram.high) == (-3.0, 1.0)
    assert histogram.used() == (0, 3)
    assert histogram.edges(0, 4).tolist() == [-4.0, -2.0, 0.0, 2.0, 4.0]


@given(batches=BATCHES)
def test_counts_are_those_of_numpy_on_the_final_grid(batches: Batches) -> None:
    histogram = filled(batches)
    everything = np.array([value for batch in batches for value in batch], dtype=np.float64)
    expected, _ = np.histogram(everything, bins=histogram.edges(0, 64).numpy())
    assert histogram.counts.tolist() == expected.tolist()
    assert (histogram.low, histogram.high) == (everything.min(), everything.max())


@given(batches=BATCHES, factor=st.integers(1, 20))
def test_doubling_keeps_counts(batches: Batches, factor: int) -> None:
    histogram = filled(batches)
    total = int(histogram.counts.sum())
    width = histogram.width
    histogram._fit(0.99 * width * 32 * 2.0**factor)
    assert histogram.width == width * 2.0**factor
    assert histogram.counts.sum() == total == sum(map(len, batches))
    assert histogram.counts[:32].sum() == sum(v < 0 for batch in batches for v in batch)


@given(batches=BATCHES, data=st.data())
def test_neither_order_nor_division_into_batches_matters(
    batches: Batches, data: st.DataObject
) -> None:
    everything = data.draw(st.permutations([value for batch in batches for value in batch]))
    one, other = filled(batches), filled([everything])
    assert torch.equal(one.counts, other.counts)
    assert one.width == other.width


def test_memory_does_not_grow() -> None:
    histogram = Histogram(64)
    for exponent in range(-30, 30, 3):
        histogram.add(torch.linspace(-(2.0**exponent), 2.0**exponent, 101))
    assert histogram.counts.numel() == 64
    assert histogram.counts.sum() == 20 * 101


def test_zeros_do_not_decide_the_width() -> None:
    histogram = filled([[0.0, 0.0], [1e-3, -2e-3]])
    assert histogram.low == pytest.approx(-2e-3)
    assert histogram.counts.count_nonzero() == 3


def test_more_values_than_are_binned_at_a_time_in_any_memory_format() -> None:
    x = torch.randn(2, 3, 300, 301, generator=torch.Generator().manual_seed(0))
    counts = []
    for y in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3), x.transpose(1, 3)):
        histogram = Histogram(1024)
        histogram.add(y)
        counts.append(histogram.counts)
    assert counts[0].sum() == x.numel()
    assert all(torch.equal(other, counts[0]) for other in counts)


def test_views_with_gaps_and_repeats_are_counted_as_seen() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    histogram = Histogram(32)
    histogram.add(x[:, ::2])
    histogram.add(x[:1, :1].expand(5, 2))
    assert histogram.counts.sum() == 16
    assert histogram.counts[16] == 11


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_channel_row_and_column_has_the_same_part(layout: torch.memory_format) -> None:
    shape = (2, 12, 30, 28)
    for dim in (1, 2, 3):
        index = torch.arange(float(shape[dim])).reshape([-1 if d == dim else 1 for d in range(4)])
        histogram = Histogram(256, most=2000)
        histogram.add((index * 4).expand(shape).contiguous(memory_format=layout))
        counts = histogram.counts[histogram.counts > 0]
        assert len(counts) == shape[dim]
        assert 900 * 2 < counts.sum() <= 2000 * 2
        assert counts.max() - counts.min() <= 0.2 * counts.min()


def test_a_part_is_the_same_in_whatever_batches_and_knows_the_extremes() -> None:
    x = torch.randn(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    for spot in range(20):
        x[spot % 6, spot % 3, spot, 3] = 100.0 + spot
    x[0, 0, 0, 0] = -100.0
    filled = []
    for y in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for size in (1, 4, 6):
            histogram = Histogram(1024, most=500)
            for batch in y.split(size):
                histogram.add(batch)
            assert (histogram.low, histogram.high) == (-100.0, 119.0)
            filled.append(histogram.counts)
    assert filled[0].sum() == 6 * -(-4800 // 11)
    assert all(torch.equal(filled[0], other) for other in filled[1:])


def test_short_examples_are_counted_wholly() -> None:
    histogram = Histogram(64, most=100)
    histogram.add(torch.rand(5, 10, 10))
    histogram.add(torch.rand(300))
    histogram.add(torch.tensor(0.5))
    assert histogram.counts.sum() == 500 + 300 + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_counting_ends_with_the_first_value_that_is_not_finite(bad: float) -> None:
    histogram = filled([[1.0], [bad, 0.0], [5.0]])
    assert not histogram.usable
    assert not (math.isfinite(histogram.low) and math.isfinite(histogram.high))
    assert histogram.counts.sum() == 1


@pytest.mark.parametrize("bins", [0, 2, 48, -8])
def test_a_number_of_bins_that_cannot_be_halved_is_refused(bins: int) -> None:
    with pytest.raises(InputError, match="power of two"):
        Histogram(bins)


def test_a_part_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="per_example: 0 is not at least 1"):
        Histogram(64, most=0)


def test_every_device_counts_alike(device: torch.device) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    here, there = Histogram(256), Histogram(256)
    here.add(x)
    there.add(x.to(device))
    assert torch.equal(here.counts, there.counts)
