"""What can be searched: named parameters, each a range or a choice.

A space is a plain mapping from names to parameters::

    {"width": IntRange(8, 64, step=8), "dropout": FloatRange(0.0, 0.5), "block": Choice("a", "b")}
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from slimkit.doors import door
from slimkit.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution

__all__ = [
    "Choice",
    "FloatRange",
    "IntRange",
    "Parameter",
    "Parameters",
    "SearchSpace",
    "Value",
    "checked_parameters",
    "checked_space",
    "random_parameters",
]

Value = bool | int | float | str | None
"""What a parameter can be: anything that JSON writes as one word."""

Parameters = Mapping[str, Value]
"""One value per name: a point of the space."""


class Parameter(Protocol):
    """One dimension of a space."""

    def sample(self, rng: np.random.Generator) -> Value:
        """A value, all equally likely."""

    def neighbour(self, value: Value, rng: np.random.Generator, width: float) -> Value:
        """Another value, at most ``width`` (0 … 1) of the whole range away."""

    def checked(self, value: Value) -> Value:
        """``value`` in its exact type; raises ``ValueError`` if it is not a possible one."""

    def distribution(self) -> BaseDistribution:
        """The same in Optuna's terms, for its samplers and its journal."""

    def to_json(self) -> dict[str, Any]:
        """What it is, for people and for comparison on resume."""


SearchSpace = Mapping[str, Parameter]
"""Name → parameter."""


@door
@dataclass(frozen=True)
class IntRange:
    """Whole numbers ``low, low + step, …`` up to ``high``, both ends included.

    Attributes:
        low: the smallest.
        high: no number is larger.
        step: distance between neighbours, at least 1.
    """

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.high < self.low or self.step < 1:
            raise InputError(f"there is no number in {self}", where="IntRange")

    @property
    def steps(self) -> int:
        """Steps from the smallest to the largest number."""
        return (self.high - self.low) // self.step

    def sample(self, rng: np.random.Generator) -> int:
        """A number, all equally likely."""
        return self.low + self.step * int(rng.integers(self.steps + 1))

    def neighbour(self, value: Value, rng: np.random.Generator, width: float) -> int:
        """Another number within ``width`` of the range, at least the next one."""
        if self.steps == 0:
            return self.low
        here = (self.checked(value) - self.low) // self.step
        reach = max(1, round(width * self.steps))
        first, last = max(0, here - reach), min(self.steps, here + reach)
        there = int(rng.integers(first, last))  # one fewer than there are: not the old one
        return self.low + self.step * (there + (there >= here))

    def checked(self, value: Value) -> int:
        """``value`` as an ``int``."""
        if isinstance(value, bool | str) or value is None or value != int(value):
            raise ValueError(f"expected a whole number, got {value!r}")
        if not self.low <= value <= self.high or (int(value) - self.low) % self.step:
            raise ValueError(f"expected one of {self}, got {value!r}")
        return int(value)

    def distribution(self) -> BaseDistribution:
        """Optuna's ``IntDistribution``."""
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.low + self.steps * self.step, step=self.step)

    def to_json(self) -> dict[str, Any]:
        """The ends and the step."""
        return {"type": "int", "low": self.low, "high": self.high, "step": self.step}

    def __str__(self) -> str:
        return f"{self.low} … {self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")


@door
@dataclass(frozen=True)
class FloatRange:
    """Numbers between ``low`` and ``high``, both included.

    Attributes:
        low: the smallest.
        high: the largest.
        log: equally likely per factor instead of per difference; needs ``low`` > 0.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not finite or self.high < self.low or (self.log and self.low <= 0):
            raise InputError(f"there is no number in {self}", where="FloatRange")

    def sample(self, rng: np.random.Generator) -> float:
        """A number, all equally likely (on the logarithmic scale if ``log``)."""
        return self._between(0.0, 1.0, rng)

    def neighbour(self, value: Value, rng: np.random.Generator, width: float) -> float:
        """A number within ``width`` of the range."""
        here = self._position(self.checked(value))
        return self._between(max(0.0, here - width), min(1.0, here + width), rng)

    def checked(self, value: Value) -> float:
        """``value`` as a ``float``."""
        if isinstance(value, bool | str) or value is None or not self.low <= value <= self.high:
            raise ValueError(f"expected a number in {self}, got {value!r}")
        return float(value)

    def distribution(self) -> BaseDistribution:
        """Optuna's ``FloatDistribution``."""
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def to_json(self) -> dict[str, Any]:
        """The ends and the scale."""
        return {"type": "float", "low": self.low, "high": self.high, "log": self.log}

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g}" + (" (logarithmic)" if self.log else "")

    def _between(self, first: float, last: float, rng: np.random.Generator) -> float:
        """A number between two positions, each 0 (low) … 1 (high)."""
        part = first + (last - first) * float(rng.random())
        if self.log:
            value = self.low * float((self.high / self.low) ** part)
        else:
            value = self.low + (self.high - self.low) * part
        return min(max(value, self.low), self.high)

    def _position(self, value: float) -> float:
        if self.high == self.low:
            return 0.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, init=False)
class Choice:
    """One of several values, without an order.

    Attributes:
        values: text, numbers, truth values or None; all different.
    """

    values: tuple[Value, ...]

    def __init__(self, *values: Value) -> None:
        plain = all(
            value is None or isinstance(value, bool | int | float | str) for value in values
        )
        if not values or not plain or len(set(values)) < len(values):
            raise InputError(
                f"expected different words or numbers, got {values!r}",
                where="Choice",
                hint="for anything else choose among names and look the name up",
            )
        object.__setattr__(self, "values", values)

    def sample(self, rng: np.random.Generator) -> Value:
        """A value, all equally likely."""
        return self.values[int(rng.integers(len(self.values)))]

    def neighbour(self, value: Value, rng: np.random.Generator, width: float) -> Value:
        """Another value; there is no near and far."""
        others = [other for other in self.values if other != value]
        return others[int(rng.integers(len(others)))] if others else value

    def checked(self, value: Value) -> Value:
        """The equal one of :attr:`values`."""
        for known in self.values:
            if known == value:
                return known
        raise ValueError(
            f"unknown value {value!r}: {nearest(str(value), [str(v) for v in self.values])}"
        )

    def distribution(self) -> BaseDistribution:
        """Optuna's ``CategoricalDistribution``."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    def to_json(self) -> dict[str, Any]:
        """The values."""
        return {"type": "choice", "values": list(self.values)}


def random_parameters(space: SearchSpace, rng: np.random.Generator) -> dict[str, Value]:
    """One value for every parameter, independently."""
    return {name: parameter.sample(rng) for name, parameter in space.items()}


def checked_space(space: object) -> dict[str, Parameter]:
    """``space`` as a dictionary.

    Raises:
        InputError: it is empty, or holds something that is no parameter.
    """
    if not isinstance(space, Mapping) or not space:
        raise InputError(
            f"expected a mapping from names to parameters, got {space!r}",
            where="space",
            hint="{'width': IntRange(8, 64)}",
        )
    for name, parameter in space.items():
        if not isinstance(name, str) or not hasattr(parameter, "neighbour"):
            raise InputError(
                f"expected IntRange, FloatRange or Choice, got {type(parameter).__name__}",
                where=f"space.{name}",
            )
    return dict(space)


def checked_parameters(
    space: SearchSpace, parameters: Parameters, *, where: str
) -> dict[str, Value]:
    """``parameters`` in the order and the types of ``space``.

    Raises:
        InputError: a name is missing or unknown, or a value is not possible.
    """
    _same_names(parameters, space, where)
    found: dict[str, Value] = {}
    for name, parameter in space.items():
        try:
            found[name] = parameter.checked(parameters[name])
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(str(error), where=f"{where}.{name}") from error
    return found


def _same_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    given, known = list(given), list(known)
    for name in given:
        if name not in known:
            raise InputError(
                f"there is no parameter {name!r}", where=where, hint=nearest(str(name), known)
            )
    for name in known:
        if name not in given:
            raise InputError(f"the parameter {name!r} is missing", where=where)
