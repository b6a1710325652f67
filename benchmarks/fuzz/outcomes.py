"""One case of a fuzzer, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """Something that a user might do, well or badly.

    Attributes:
        name: says what is done, and is unique for a seed.
        act: does it. A :class:`~slimkit.errors.SlimkitError` is typed, any other exception raw.
        judge: whether what ``act`` returned is right; None where every value is. A value that is
            not right was wrong without a word.
    """

    name: str
    act: Callable[[], object]
    judge: Callable[[object], bool] | None = None
