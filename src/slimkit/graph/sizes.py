"""Sizes that remember where they come from.

``x.view(b, 2, c // 2, h, w)`` follows when channels leave if ``c`` was read from a tensor,
and breaks if it was written as a number. The arguments that an operator gets are plain
integers either way. So during capture ``x.shape`` and ``x.size()`` answer with integers
that carry their origin through multiplications and exact divisions.
"""

from __future__ import annotations

from math import gcd
from typing import Any

__all__ = ["Origin", "TrackedInt"]

Origin = tuple[int, int]
"""(value number, dimension)."""


class TrackedInt(int):
    """An integer equal to the product of some tensor sizes, times a fraction.

    Arithmetic that cannot be followed gives plain integers and notes the origins in
    ``escaped``, because the result would change if channels left.

    Attributes:
        origins: the sizes that are multiplied.
        numerator_, denominator_: the fraction, in lowest terms.
        escaped: shared set of origins whose size entered other arithmetic.
    """

    origins: tuple[Origin, ...]
    numerator_: int
    denominator_: int
    escaped: set[Origin]

    def __new__(
        cls,
        value: int,
        origins: tuple[Origin, ...],
        escaped: set[Origin],
        numerator: int = 1,
        denominator: int = 1,
    ) -> TrackedInt:
        """Make one; see the class."""
        self = super().__new__(cls, value)
        common = gcd(numerator, denominator) or 1
        self.origins = origins
        self.escaped = escaped
        self.numerator_ = numerator // common
        self.denominator_ = denominator // common
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int.__int__(self),)

    def __mul__(self, other: Any) -> Any:
        value = int.__mul__(self, other)
        if isinstance(other, TrackedInt):
            return TrackedInt(
                value,
                self.origins + other.origins,
                self.escaped,
                self.numerator_ * other.numerator_,
                self.denominator_ * other.denominator_,
            )
        if type(other) is int and other:
            numerator = self.numerator_ * other
            return TrackedInt(value, self.origins, self.escaped, numerator, self.denominator_)
        return self._escape(other, value)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int.__floordiv__(self, other)
        if type(other) is int and int.__mod__(self, other) == 0:
            denominator = self.denominator_ * other
            return TrackedInt(value, self.origins, self.escaped, self.numerator_, denominator)
        return self._escape(other, value)

    def _escape(self, other: Any, value: Any) -> Any:
        self.escaped.update(self.origins)
        if isinstance(other, TrackedInt):
            self.escaped.update(other.origins)
        return value

    def __add__(self, other: Any) -> Any:
        return self._escape(other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._escape(other, int.__radd__(self, other))

    def __sub__(self, other: Any) -> Any:
        return self._escape(other, int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._escape(other, int.__rsub__(self, other))

    def __truediv__(self, other: Any) -> Any:
        return self._escape(other, int.__truediv__(self, other))

    def __rtruediv__(self, other: Any) -> Any:
        return self._escape(other, int.__rtruediv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._escape(other, int.__rfloordiv__(self, other))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return self._escape(other, int.__pow__(self, other, modulo))

    def __float__(self) -> float:
        self.escaped.update(self.origins)
        return int.__float__(self)
