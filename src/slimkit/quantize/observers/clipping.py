"""Observers that weigh clipping against rounding: a narrower range has a smaller step.

Both keep a :class:`~slimkit.quantize.observers.histograms.Histogram` and search it when they are
asked for the range, so that they read the data once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.quantize.observers.histograms import Histogram
from slimkit.quantize.observers.ranges import OBSERVERS, Counting
from slimkit.quantize.scales import affine_parameters
from slimkit.quantize.targets import NumberFormat

__all__ = ["KL", "MSE", "divergences", "squared_errors"]

_CANDIDATES = 512  # thresholds that KL compares
_GRID = 5  # values of each end that MSE compares in one round


@door
@OBSERVERS.register("kl")
@dataclass(eq=False)
class KL(Counting):
    """The range whose quantized histogram diverges least from the histogram (entropy calibration).

    Migacz, "8-bit inference with TensorRT", GTC 2017; compared with others by Wu et al., 2020
    (https://arxiv.org/abs/2004.09602, section 5). The candidates are thresholds t on the
    magnitude: the range is [−t, t] without what no value has reached, so it begins at 0 after
    a ReLU; see :func:`divergences` for the measure. As in TensorRT, the bin at zero is cut
    down to its neighbours' count: the zeros of a ReLU are represented exactly and would
    outweigh everything else.

    A range holds at least half of the values, and has at least as many bins as the format has
    integers, because there is nothing to compare below. However far an outlier lies, an 8-bit
    range of 8192 bins does not get narrower than 1/32 to 1/8 of its magnitude.
    """

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`~slimkit.quantize.observers.ranges.Observer`."""
        seen = self._histogram
        low, high = seen.extremes()
        if not seen.usable:
            return low, high
        counts = _without_excess_zeros(seen)
        thresholds, first, stop = _candidates(seen, form)
        if len(thresholds) < 2:
            return low, high
        losses = divergences(counts, first, stop, form.qmax - form.qmin + 1)
        limit = int(thresholds[losses.argmin()]) * seen.width
        return low.clamp(min=-limit), high.clamp(max=limit)


def _without_excess_zeros(seen: Histogram) -> Tensor:
    """The counts as float64; at zero no more than in the larger of the bins beside it."""
    counts = seen.counts.double()
    beside = torch.maximum(counts[seen.zero - 1], counts[seen.zero + 1])
    if beside > 0:
        counts[seen.zero] = torch.minimum(counts[seen.zero], beside)
    return counts


def _candidates(seen: Histogram, form: NumberFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds in bins, the widest one last, and the first bin and the end of their ranges."""
    first, stop = seen.used()
    below, above = seen.zero - first, stop - seen.zero
    largest = max(below, above)
    if form.symmetric:
        below, above = (largest if form.signed else 0), largest
    thresholds = torch.linspace(1, largest, min(largest, _CANDIDATES)).round().long()
    starts = seen.zero - thresholds.clamp(max=below)
    stops = seen.zero + thresholds.clamp(max=above)
    cumulated = torch.cumsum(seen.counts, 0)
    inside = cumulated[stops - 1] - torch.where(starts > 0, cumulated[starts - 1], 0)
    enough = (stops - starts >= form.qmax - form.qmin + 1) & (2 * inside >= cumulated[-1])
    return thresholds[enough], starts[enough], stops[enough]


def divergences(counts: Tensor, first: Tensor, stop: Tensor, levels: int) -> Tensor:
    """Kullback–Leibler divergence KL(P ‖ Q) of each of K clipping ranges.

    P is the histogram inside the range, with what is clipped added to the bins at its ends. Q
    is the histogram inside the range without that, divided into ``levels`` equal parts; the
    count of each part is spread evenly over those of its bins where P is not 0. Where P has
    nothing but clipped values in the part at an end, Q has one value there, for a finite answer.

    Args:
        counts: of all bins, float64, shape (bins,).
        first: first bin of each range, int64, shape (K,).
        stop: end of each range, likewise; stop − first ≥ levels ≥ 2.
        levels: number of integers.

    Returns:
        float64, ≥ 0 up to rounding, in nats, shape (K,).
    """
    mass, filled, entropy = (
        torch.nn.functional.pad(torch.cumsum(values, 0), (1, 0))
        for values in (counts, (counts > 0).double(), torch.xlogy(counts, counts))
    )
    # The sums over bins are differences of running sums: the work is K × levels, not K × bins.
    parts = torch.arange(levels + 1) * (stop - first)[:, None]
    edges = first[:, None] + (parts + levels - 1) // levels
    original, occupied = mass[edges].diff(), filled[edges].diff()
    quantized = original.clone()
    own = entropy[stop] - entropy[first]
    for end, bins, clipped in (
        (0, first, mass[first]),
        (-1, stop - 1, mass[-1] - mass[stop]),
    ):
        count, some = counts[bins], clipped > 0
        own += torch.xlogy(count + clipped, count + clipped) - torch.xlogy(count, count)
        original[:, end] += clipped
        occupied[:, end] += some & (count == 0)
        quantized[:, end] = torch.where(some, quantized[:, end].clamp(min=1.0), quantized[:, end])
    cross = torch.xlogy(original, quantized / occupied.clamp(min=1.0)).sum(1)
    return (own - cross) / mass[-1] - torch.log(mass[-1] / quantized.sum(1))


@door
@OBSERVERS.register("mse")
@dataclass(eq=False)
class MSE(Counting):
    """The range with the smallest expected squared error, clipping and rounding together.

    Nagel et al., 2021 (https://arxiv.org/abs/2106.08295, section 3.1). The error is that of
    the grid of scale and zero point which the range leads to, integrated over the bins of the
    histogram; see :func:`squared_errors`. Both ends are searched for asymmetric formats, the
    magnitude for symmetric ones: a grid of candidates over the whole range, and then around
    the best one with half the distances, until they are below a bin. That finds the best
    range, or one as good, because clipping error and rounding error (step² / 12) are convex
    functions of the two ends, up to ripples where a step is as wide as most of the values.
    """

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`~slimkit.quantize.observers.ranges.Observer`."""
        seen = self._histogram
        low, high = seen.extremes()
        if not seen.usable or seen.low == seen.high == 0.0:
            return low, high
        if not form.symmetric:
            best_low, best_high = _best_range(seen, form, min(seen.low, 0.0), max(seen.high, 0.0))
        else:
            _, best_high = _best_range(seen, form, 0.0, max(-seen.low, seen.high))
            best_low = -best_high
        return low.clamp(min=best_low), high.clamp(max=best_high)


def _best_range(
    seen: Histogram, form: NumberFormat, low: float, high: float
) -> tuple[float, float]:
    """The range inside [low, high] with the smallest squared error, low ≤ 0 ≤ high, not both 0."""
    first, stop = seen.used()
    edges, counts = seen.edges(first, stop), seen.counts[first:stop].double()
    offsets = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float64)
    best, smallest = (low, high), float("inf")
    centre, reach = (low / 2.0, high / 2.0), (-low / 2.0, high / 2.0)
    while True:
        lows = torch.unique((centre[0] + reach[0] * offsets).clamp(low, 0.0))
        highs = torch.unique((centre[1] + reach[1] * offsets).clamp(0.0, high))
        pairs = torch.cartesian_prod(lows, highs.flip(0))  # the widest first: it wins a tie
        pairs = pairs[(pairs != 0.0).any(1)]  # 0 … 0 has no scale
        scales, zero_points = affine_parameters(pairs[:, 0], pairs[:, 1], form)
        errors = squared_errors(edges, counts, scales, zero_points, form)
        winner = int(errors.argmin())
        if errors[winner] < smallest:
            smallest = errors[winner].item()
            best = (pairs[winner, 0].item(), pairs[winner, 1].item())
        if max(reach) <= seen.width:
            return best
        centre, reach = best, (reach[0] / 2.0, reach[1] / 2.0)


def squared_errors(
    edges: Tensor, counts: Tensor, scales: Tensor, zero_points: Tensor, form: NumberFormat
) -> Tensor:
    """Mean squared error of rounding to each of K grids, for values spread evenly in bins.

    With k = clamp(round(x / scale), qmin − zero point, qmax − zero point) and r = x − k · scale,
    the integral of the squared error from 0 to x is k · scale³ / 12 + r³ / 3: whole steps, and
    what is left of one, or reaches beyond the outermost level.

    Args:
        edges: of the bins, float64, shape (bins + 1,).
        counts: of the bins, float64, shape (bins,), not all 0.
        scales: float32, > 0, shape (K,).
        zero_points: int32, shape (K,).
        form: number format.

    Returns:
        float64, shape (K,), in the unit of the values squared.
    """
    scale, zero_point = scales.double()[:, None], zero_points.double()[:, None]
    steps = (edges / scale).round_()
    steps = steps.clamp_(form.qmin - zero_point, form.qmax - zero_point)
    rest = edges - steps * scale
    integral = steps.mul_(scale**3 / 12.0).add_(rest**3 / 3.0)
    return integral.diff(dim=1) @ (counts / counts.sum()) / (edges[1] - edges[0])
