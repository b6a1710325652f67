"""Observers: which range of values a tensor has over many batches.

Each sees a stream of tensors and keeps a bounded summary; :mod:`slimkit.quantize.scales` turns
the range into scale and zero point.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.registry import Registry

__all__ = [
    "OBSERVERS",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
]

_TINY = 1e-12  # no scale is smaller: 1 / scale and bias / scale stay finite


class Observer(Protocol):
    """Summarises a stream of tensors; a fresh one is made for every quantizer.

    The constructor takes no required argument.
    """

    def update(self, x: Tensor) -> None:
        """Take in one batch: any shape, not empty, float32, no gradient."""

    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest value to represent, two tensors of shape ()."""


OBSERVERS: Registry[type[Observer]] = Registry("observer")
"""Name → observer class."""


@OBSERVERS.register("minmax")
class MinMax:
    """The smallest and the largest value ever seen."""

    def __init__(self) -> None:
        self._range: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        """Widen the range to that of ``x``."""
        low, high = torch.aminmax(x)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`."""
        return _seen(self._range)


@OBSERVERS.register("moving_average")
class MovingAverage:
    """Exponential moving averages of each batch's smallest and largest value.

    Jacob et al., 2018 (https://arxiv.org/abs/1712.05877, section 3.1).

    Args:
        momentum: weight of the newest batch, in (0, 1]; the first batch counts in full.
        start: a (low, high) to go on from.
    """

    def __init__(self, momentum: float = 0.1, start: tuple[Tensor, Tensor] | None = None) -> None:
        if not 0.0 < momentum <= 1.0:
            raise InputError(f"{momentum} is not in (0, 1]", where="momentum")
        self._momentum = momentum
        self._range = start

    def update(self, x: Tensor) -> None:
        """Move the range a step towards that of ``x``."""
        low, high = torch.aminmax(x)
        if self._range is not None:
            low = torch.lerp(self._range[0], low, self._momentum)
            high = torch.lerp(self._range[1], high, self._momentum)
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`."""
        return _seen(self._range)


@OBSERVERS.register("percentile")
class Percentile:
    """The range without the outermost values, from a histogram of fixed size.

    The histogram's bins are multiples of one width; when a value falls outside, the width
    doubles and neighbours merge, so nothing seen before is lost or smeared.

    Args:
        percentile: share of the values, in per cent, that each end of the range covers:
            99.99 leaves the smallest 0.01 % and the largest 0.01 % outside.
        bins: number of bins, a multiple of 4; memory is 8 bytes each.
    """

    def __init__(self, percentile: float = 99.99, bins: int = 8192) -> None:
        if not 50.0 < percentile <= 100.0:
            raise InputError(f"{percentile} is not in (50, 100]", where="percentile")
        if bins < 4 or bins % 4:
            raise InputError(f"{bins} is not a multiple of 4", where="bins")
        self._tail = 1.0 - percentile / 100.0
        self._half = bins // 2
        self._width = 0.0
        self._counts = torch.zeros(bins, dtype=torch.float64)
        self._extremes = MinMax()

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``."""
        self._extremes.update(x)
        low, high = torch.aminmax(x)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return  # the extremes keep it, and whoever reads the range finds out
        self._fit(max(abs(low.item()), abs(high.item())))
        limit = self._width * self._half
        counts = torch.histc(x.detach().float(), bins=2 * self._half, min=-limit, max=limit)
        self._counts += counts.to(self._counts)

    def range(self) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`."""
        low, high = self._extremes.range()
        cumulated = torch.cumsum(self._counts, 0)
        total = float(cumulated[-1])
        if total == 0.0 or not (torch.isfinite(low) and torch.isfinite(high)):
            return low, high
        first = int(torch.searchsorted(cumulated, self._tail * total, right=True))
        last = int(torch.searchsorted(cumulated, (1.0 - self._tail) * total))
        inner_low = (first - self._half) * self._width
        inner_high = (min(last, 2 * self._half - 1) + 1 - self._half) * self._width
        return low.clamp(min=inner_low), high.clamp(max=inner_high)

    def _fit(self, magnitude: float) -> None:
        """Double the width until ``magnitude`` lies inside."""
        if self._width == 0.0:
            self._width = max(magnitude, _TINY) / self._half
        while magnitude > self._width * self._half:
            self._width *= 2.0
            merged = self._counts.reshape(-1, 2).sum(1)  # the grid is anchored at 0: pairs align
            self._counts = torch.zeros_like(self._counts)
            quarter = self._half // 2
            self._counts[quarter : quarter + self._half] = merged


def _seen(values: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if values is None:
        raise InputError("the observer has not seen any data", where="observer")
    return values
