"""A histogram of a stream of values whose range nobody knows beforehand, in bounded memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkit.errors import InputError

__all__ = ["Histogram"]

_PIECE = 1 << 18  # values binned at a time: what lies between the passes stays in the cache
_SMALLEST_EXPONENT = -40  # of the limit: 1 / width stays finite in float32


class Histogram:
    """Counts of values in bins of equal width, half of them below zero and half from zero on.

    The range is ±limit, and limit is a power of two above the largest magnitude seen. When a
    value falls outside, the width doubles and neighbours merge: the grid is anchored at zero, so
    no count is split or moved. The counts therefore depend on the values alone, not on their
    order or on how they were divided into batches, and at least a quarter of the bins is in use.

    Binning, most of it ``torch.bincount``, takes about as long as the layers that make the values.
    Of a large tensor a part is therefore counted: every k-th
    value of an example, in the order in which they lie in memory, where k has no divisor in common
    with their number, so that all channels, rows and columns have the same part in it.

    Args:
        bins: number of bins, a power of two ≥ 4; memory is 8 bytes each.
        most: values of one example, x[i], that are counted; of longer ones every k-th with the
            smallest suitable k. None counts them all.

    Attributes:
        counts: int64, on the CPU, shape (bins,). Bin i holds (i − bins / 2) · width ≤ x <
            (i + 1 − bins / 2) · width.
        width: of a bin; 0 before the first value.
        low: the smallest value seen, counted or not; infinity before the first one.
        high: the largest, likewise; minus infinity. When a batch holds NaN or infinity, low
            and high keep that batch's extremes for good, and nothing is counted any more.
    """

    def __init__(self, bins: int, *, most: int | None = None) -> None:
        if bins < 4 or bins & (bins - 1):
            raise InputError(f"{bins} is not a power of two ≥ 4", where="bins")
        if most is not None and most < 1:
            raise InputError(f"{most} is not at least 1", where="per_example", hint="65536")
        self._most = most
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.width = 0.0
        self.low, self.high = math.inf, -math.inf
        self._poisoned = False

    @property
    def usable(self) -> bool:
        """Whether something was counted, and every value so far was finite."""
        return self.width > 0.0 and not self._poisoned

    @property
    def zero(self) -> int:
        """The bin that begins at zero: half the number of bins."""
        return self.counts.numel() // 2

    def extremes(self) -> tuple[Tensor, Tensor]:
        """``low`` and ``high`` as float32 tensors of shape ().

        Raises:
            InputError: no value was seen.
        """
        if not self.width and not self._poisoned:
            raise InputError("the observer has not seen any data", where="observer")
        return torch.tensor(self.low), torch.tensor(self.high)

    def used(self) -> tuple[int, int]:
        """The smallest run of bins [first, stop) that holds every count and touches zero."""
        filled = torch.nonzero(self.counts)
        first, last = int(filled[0]), int(filled[-1])
        return min(first, self.zero), max(last + 1, self.zero)

    def edges(self, first: int, stop: int) -> Tensor:
        """The edges of the bins [first, stop): float64, shape (stop − first + 1,)."""
        return torch.arange(first - self.zero, stop - self.zero + 1).double() * self.width

    def add(self, x: Tensor) -> None:
        """Count the values of ``x``: any shape, not empty, float32, on any device."""
        low, high = torch.stack(torch.aminmax(x.detach())).tolist()
        if self._poisoned:
            return
        if not (math.isfinite(low) and math.isfinite(high)):
            self.low, self.high, self._poisoned = low, high, True
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._fit(max(-low, high))
        scale = 1.0 / self.width  # a power of two: no product is rounded
        for piece in torch.split(_part(x.detach(), self._most), _PIECE):
            index = torch.mul(piece, scale).floor_().add_(self.zero).to(torch.int32)
            found = torch.bincount(index).to(self.counts.device)
            self.counts[: found.numel()] += found

    def _fit(self, magnitude: float) -> None:
        """Double the width until ``magnitude`` lies inside ±limit."""
        exponent = math.frexp(magnitude)[1] if magnitude else _SMALLEST_EXPONENT
        exponent = max(exponent, _SMALLEST_EXPONENT)  # magnitude < 2^exponent
        width = math.ldexp(1.0, exponent) / self.zero
        if not self.width:
            self.width = width
        while self.width < width:
            self.width *= 2.0
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[self.zero // 2 : self.zero // 2 + self.zero] = merged


def _part(x: Tensor, most: int | None) -> Tensor:
    """The values to count, in one dimension."""
    examples = x.shape[0] if x.dim() else 1
    size = x.numel() // examples
    step = 1 if most is None else _step(size, most)
    if step == 1:
        return _in_memory_order(x)
    first, *others = sorted(range(x.dim()), key=x.stride, reverse=True)
    if first == 0:
        return x.permute(0, *others).reshape(examples, size)[:, ::step].reshape(-1)
    return torch.cat([_in_memory_order(example)[::step] for example in x])


def _step(size: int, most: int) -> int:
    """The smallest one that leaves at most ``most`` of ``size`` and shares no divisor with it."""
    step = -(-size // most)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _in_memory_order(x: Tensor) -> Tensor:
    """All values in one dimension, without a copy if there are no gaps (channels last, …)."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(order).reshape(-1)
