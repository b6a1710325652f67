"""Symbolic sizes: integers that remember which dimensions or attributes they come from.

``x.view(b, 2, c // 2, h, w)`` follows when channels leave if ``c`` was read from a tensor, and
``x.view(b, n, self.num_heads, -1)`` if the attribute shrinks too; both break if the number was
written into the code. The arguments that an operator gets are plain integers in all cases. So
during capture ``x.shape``, ``x.size()`` and the whole-number attributes of modules answer with
integers that carry their origin through multiplications and exact divisions.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

__all__ = ["Origin", "Powers", "TrackedInt", "attribute_origin"]

Origin = tuple[int, int]
"""(value number, dimension); for the attribute number ``k`` of a graph ``(-1 - k, 0)``."""

Powers = tuple[tuple[Origin, int], ...]
"""A product of sizes, each with its exponent; exponents are not 0, origins distinct."""


def attribute_origin(number: int) -> Origin:
    """The origin that stands for :attr:`Graph.attributes[number] <Graph.attributes>`."""
    return (-1 - number, 0)


class TrackedInt(int):
    """An integer equal to a product of sizes and their inverses, times a fraction.

    Arithmetic that cannot be followed gives plain numbers and notes in ``fixed`` what must not
    change for them to stay right. So do comparisons that found equality.

    Attributes:
        powers: the sizes that are multiplied and divided.
        numerator_, denominator_: the fraction, in lowest terms.
        fixed: shared list of products whose value the model relies on.
    """

    powers: Powers
    numerator_: int
    denominator_: int
    fixed: list[Powers]

    def __new__(
        cls,
        value: int,
        powers: Powers,
        fixed: list[Powers],
        numerator: int = 1,
        denominator: int = 1,
    ) -> TrackedInt:
        """Make one; see the class."""
        self = super().__new__(cls, value)
        common = gcd(numerator, denominator) or 1
        self.powers = powers
        self.fixed = fixed
        self.numerator_ = numerator // common
        self.denominator_ = denominator // common
        return self

    __hash__ = int.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int.__int__(self),)

    def __deepcopy__(self, _memo: dict[int, Any]) -> int:
        return int.__int__(self)

    def __mul__(self, other: Any) -> Any:
        value = int.__mul__(self, other)
        if isinstance(other, TrackedInt):
            return TrackedInt(
                value,
                _product(self.powers, other.powers, 1),
                self.fixed,
                self.numerator_ * other.numerator_,
                self.denominator_ * other.denominator_,
            )
        if type(other) is int and other:
            numerator = self.numerator_ * other
            return TrackedInt(value, self.powers, self.fixed, numerator, self.denominator_)
        return self._relied_on(other, value)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int.__floordiv__(self, other)
        if not isinstance(other, int) or int.__mod__(self, other) != 0:
            return self._relied_on(other, value)
        if isinstance(other, TrackedInt):
            return TrackedInt(
                value,
                _product(self.powers, other.powers, -1),
                self.fixed,
                self.numerator_ * other.denominator_,
                self.denominator_ * other.numerator_,
            )
        denominator = self.denominator_ * other
        return TrackedInt(value, self.powers, self.fixed, self.numerator_, denominator)

    def __truediv__(self, other: Any) -> Any:
        value = int.__truediv__(self, other)
        if isinstance(other, TrackedInt):  # their quotient must stay, not each of them
            self.fixed.append(_product(self.powers, other.powers, -1))
            return value
        return self._relied_on(other, value)

    def __eq__(self, other: object) -> bool:
        return self._compared(other, int.__eq__(self, other))

    def __ne__(self, other: object) -> bool:
        equal = self._compared(other, int.__eq__(self, other))
        return equal if equal is NotImplemented else not equal

    def _compared(self, other: object, equal: bool) -> bool:
        if equal is True and self is not other:
            inverse = other.powers if isinstance(other, TrackedInt) else ()
            self.fixed.append(_product(self.powers, inverse, -1))
        return equal

    def _relied_on(self, other: Any, value: Any) -> Any:
        self.fixed.append(self.powers)
        if isinstance(other, TrackedInt):
            self.fixed.append(other.powers)
        return value

    def __float__(self) -> float:
        self.fixed.append(self.powers)
        return int.__float__(self)


def _product(first: Powers, second: Powers, sign: int) -> Powers:
    """``first · second**sign``."""
    total = dict(first)
    for origin, power in second:
        total[origin] = total.get(origin, 0) + sign * power
    return tuple((origin, power) for origin, power in total.items() if power)


def _noting(name: str) -> Callable[[TrackedInt, Any], Any]:
    """Arithmetic that is not followed."""
    plain = getattr(int, name)

    def method(self: TrackedInt, other: Any, *rest: Any) -> Any:
        return self._relied_on(other, plain(self, other, *rest))

    method.__name__ = name
    return method


for _name in ("add", "radd", "sub", "rsub", "rtruediv", "rfloordiv", "pow", "rpow"):
    setattr(TrackedInt, f"__{_name}__", _noting(f"__{_name}__"))
