"""Running cases: each within a time limit, and what came of it counted."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.fuzz.outcomes import Case
from slimkit.errors import SlimkitError

__all__ = ["OUTCOMES", "Tally", "run"]

OUTCOMES = ("right", "typed", "raw", "wrong", "hang", "lost")
"""right: done; typed: a SlimkitError; raw: any other exception; wrong: accepted, and the result is
another one; hang: over the limit; lost: a file that nobody damaged is gone or changed."""
SECONDS = 20
"""Limit of a case; the slowest takes a few."""


class _TooLongError(BaseException):
    """No ``except Exception`` swallows it."""


@dataclass
class Tally:
    """What came of many cases.

    Attributes:
        counts: outcome → cases.
        told: name and reason of each that is neither right nor typed.
    """

    counts: Counter[str] = field(default_factory=Counter)
    told: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def run(cases: Iterable[Case]) -> Tally:
    """Run every case and count."""
    tally = Tally()
    for case in cases:
        outcome, reason = _outcome(case)
        tally.counts[outcome] += 1
        if outcome not in {"right", "typed"}:
            tally.told.append((case.name, outcome, reason))
    return tally


def _outcome(case: Case) -> tuple[str, str]:
    try:
        with _limited(SECONDS):
            value = case.act()
            right = case.judge is None or case.judge(value)
    except SlimkitError:
        return "typed", ""
    except _TooLongError:
        return "hang", f"more than {SECONDS} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        outcome = "lost" if kind == "FileLostError" else "raw"
        return outcome, f"{kind}: {str(error)[:120]} ({last.filename}:{last.lineno})"
    return ("right", "") if right else ("wrong", "accepted, with another result")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise after so many seconds; on the main thread of a Unix process."""

    def over(*_: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
