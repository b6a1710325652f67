"""Observers: which range of values a tensor has over many batches.

Each sees a stream of tensors, once, and keeps a summary of bounded size. An observer is a
dataclass: its fields are its settings, in Python as in a recipe. This file has those that
summarise what they see; the two that weigh clipping against rounding are in
:mod:`slimkit.quantize.observers.clipping`. :mod:`slimkit.quantize.scales` turns the range into
scale and zero point.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.quantize.observers.histograms import Histogram
from slimkit.quantize.targets import NumberFormat
from slimkit.registry import Registry

__all__ = [
    "MOMENTUM",
    "OBSERVERS",
    "Counting",
    "MeanOfMaxima",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "describe_observer",
    "new_observer",
    "towards",
]


class Observer(Protocol):
    """Summarises a stream of tensors; a fresh one is made for every quantizer.

    The constructor takes no required argument. A dataclass can also be chosen with settings
    of its own: its fields that are arguments of the constructor. One whose range depends on the
    values alone, however they are divided into batches, may say so by a class attribute
    ``divisible = True``: large batches are then given to it in parts, which is faster.
    """

    def update(self, x: Tensor) -> None:
        """Take in one batch: any shape, not empty, float32, no gradient."""

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """The smallest and largest value to represent, two tensors of shape ().

        Args:
            form: the integers that the range will be divided among.

        Raises:
            InputError: nothing was seen yet.
        """


OBSERVERS: Registry[type[Observer]] = Registry(
    "observer", fits=lambda thing: hasattr(thing, "update") and callable(thing)
)
"""Name → observer class."""

MOMENTUM = 0.1
"""Weight of the newest batch in a moving average of ranges. Ten batches or so then count, which
follows weights that train and forgets their beginning within the 200 steps of :func:`qat`."""


def new_observer(choice: str | Observer) -> Observer:
    """A fresh observer.

    Args:
        choice: a name in :data:`OBSERVERS`, or an observer whose settings the new one gets.
            What that one has seen stays behind if it is a dataclass; any other is copied.

    Raises:
        UnknownNameError: no observer has that name.
        InputError: it is not an observer, such as a class instead of an instance.
    """
    if isinstance(choice, str):
        return OBSERVERS.get(choice, where="observer")()
    complete = all(callable(getattr(choice, name, None)) for name in ("update", "range"))
    if isinstance(choice, type) or not complete:
        raise InputError(
            f"expected a name or an observer, got {choice!r}",
            where="observer",
            hint="such as 'percentile' or Percentile(percentile=99.9)",
        )
    has_settings: bool = dataclasses.is_dataclass(cast("object", choice))
    fresh = dataclasses.replace if has_settings else copy.deepcopy
    return cast("Observer", fresh(cast("Any", choice)))


def describe_observer(choice: str | Observer) -> str:
    """A choice in words: ``"minmax"``, ``"percentile(percentile=99.9)"``, ``"my_module:Mine"``.

    Args:
        choice: as for :func:`new_observer`.
    """
    if isinstance(choice, str):
        return choice
    given = cast("Any", choice)
    kind = type(given)
    names = (name for name in OBSERVERS if OBSERVERS.get(name) is kind)
    name = next(names, f"{kind.__module__}:{kind.__qualname__}")
    if not dataclasses.is_dataclass(given):
        return name
    shown = [f for f in dataclasses.fields(given) if f.init and f.repr]
    values = [(f.name, getattr(given, f.name), f.default) for f in shown]
    settings = ", ".join(f"{key}={value!r}" for key, value, default in values if value != default)
    return f"{name}({settings})" if settings else name


@OBSERVERS.register("minmax")
@dataclass(eq=False)
class MinMax:
    """The smallest and the largest value ever seen."""

    divisible: ClassVar[bool] = True

    _range: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def update(self, x: Tensor) -> None:
        """Widen the range to that of ``x``."""
        low, high = torch.aminmax(x)
        if self._range is not None:
            low, high = torch.minimum(low, self._range[0]), torch.maximum(high, self._range[1])
        self._range = low, high

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`; the same for every format."""
        return _seen(self._range)


@door
@OBSERVERS.register("moving_average")
@dataclass(eq=False)
class MovingAverage:
    """Exponential moving averages of each batch's smallest and largest value.

    Jacob et al., 2018 (https://arxiv.org/abs/1712.05877, section 3.1).

    Attributes:
        momentum: weight of the newest batch, in (0, 1]; the first batch counts in full.

    Raises:
        InputError: the momentum is out of range.
    """

    momentum: float = MOMENTUM
    _range: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum <= 1.0:
            raise InputError(f"{self.momentum} is not in (0, 1]", where="momentum")

    def update(self, x: Tensor) -> None:
        """Move the range a step towards that of ``x``."""
        self._range = towards(self._range, torch.aminmax(x), self.momentum)

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`; the same for every format."""
        return _seen(self._range)


@OBSERVERS.register("mean_of_maxima")
@dataclass(eq=False)
class MeanOfMaxima:
    """The mean over the batches of each batch's smallest and largest value.

    Every batch counts alike, whatever its size, and in any order. One rare peak moves the
    range by 1/batches of its height; what is above the mean is clipped, so the range shrinks
    as batches do: a batch of one image gives the mean over images of their maxima.
    """

    _range: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _batches: int = field(default=0, init=False, repr=False)

    def update(self, x: Tensor) -> None:
        """Take the extremes of ``x`` into the means."""
        self._batches += 1
        self._range = towards(self._range, torch.aminmax(x), 1.0 / self._batches)

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`; the same for every format."""
        return _seen(self._range)


@dataclass(eq=False)
class Counting:
    """Base of observers that count values in a histogram of fixed size.

    Attributes:
        bins: of the :class:`~slimkit.quantize.observers.histograms.Histogram`.
        per_example: values of one example that are counted at most, spread evenly over it; None
            counts them all. The smallest and the largest value are always known.
    """

    divisible: ClassVar[bool] = True

    bins: int = field(default=8192, kw_only=True)
    per_example: int | None = field(default=65536, kw_only=True)
    _histogram: Histogram = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._histogram = Histogram(self.bins, most=self.per_example)

    def update(self, x: Tensor) -> None:
        """Count the values of ``x``."""
        self._histogram.add(x)


@door
@OBSERVERS.register("percentile")
@dataclass(eq=False)
class Percentile(Counting):
    """The range without the outermost values, from a histogram of fixed size.

    Wu et al., 2020 (https://arxiv.org/abs/2004.09602, section 5) find 99.99 to 99.9999 good
    for most networks. The range is up to a bin wider than the exact percentile, and never
    wider than the values.

    Attributes:
        percentile: share of the values, in per cent, that each end of the range covers, above
            50 and up to 100: 99.99 leaves the smallest 0.01 % and the largest 0.01 % outside.

    Raises:
        InputError: a setting is out of range.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise InputError(f"{self.percentile} is not in (50, 100]", where="percentile")
        super().__post_init__()

    def range(self, form: NumberFormat) -> tuple[Tensor, Tensor]:
        """See :class:`Observer`; the same for every format."""
        seen = self._histogram
        low, high = seen.extremes()
        if not seen.usable:
            return low, high
        cumulated = torch.cumsum(seen.counts, 0).double()
        total = cumulated[-1].item()
        tail = (1.0 - self.percentile / 100.0) * total
        first = int(torch.searchsorted(cumulated, tail, right=True))
        last = int(torch.searchsorted(cumulated, total - tail))
        inner_low = (first - seen.zero) * seen.width
        inner_high = (last + 1 - seen.zero) * seen.width
        return low.clamp(min=inner_low), high.clamp(max=inner_high)


def towards(
    mean: tuple[Tensor, Tensor] | None, newest: tuple[Tensor, Tensor], weight: float
) -> tuple[Tensor, Tensor]:
    """Each end of ``mean`` moved towards that of ``newest`` by the fraction ``weight``."""
    if mean is None:
        return newest
    return torch.lerp(mean[0], newest[0], weight), torch.lerp(mean[1], newest[1], weight)


def _seen(values: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if values is None:
        raise InputError("the observer has not seen any data", where="observer")
    return values
