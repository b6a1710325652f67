"""Progress on standard error: a live bar in a terminal, a line per result elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["LONG", "ProgressDisplay"]

LONG = 10.0
"""Seconds: what takes longer deserves to be shown to somebody who waits for it."""
_SOONEST = 1.0
"""Seconds: the very first steps, which warm caches up, tell nothing about the others."""


class ProgressDisplay:
    """Progress on standard error.

    Args:
        total: steps in all.
        done: steps done before it was resumed.
        label: what is going on.
        enabled: False shows nothing.
        fields: names of the texts beside the bar, set by :meth:`update`.
        patience: seconds; nothing is shown unless all steps together are likely to take longer,
            judged by those that are done. Where there is no bar, a line then comes no more often
            than that, and says how much time is left.
    """

    def __init__(
        self,
        total: int,
        done: int,
        *,
        label: str,
        enabled: bool,
        fields: tuple[str, ...] = ("news",),
        patience: float = 0.0,
    ) -> None:
        self.label, self.total = label, total
        self._enabled, self._fields, self._patience = enabled, fields, patience
        self._before = self._done = done
        self._start = self._last = time.monotonic()
        self._console: Console | None = None
        self._bar: Progress | None = None
        if enabled and not patience:
            self._show()

    def __enter__(self) -> Self:
        self._start = self._last = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, news: str) -> None:
        """So many steps are done, and this is what the last one gave."""
        self._done = done
        if self._enabled and self._console is None and self._is_long():
            self._show()
            if self._bar is not None:
                self._bar.start()
        self.update(done, news=news)
        now = time.monotonic()
        if now - self._last >= self._patience:
            self._last = now
            self.line(f"{done}/{self.total} {news}{self._left()}")

    def update(self, done: int | None = None, **texts: Any) -> None:
        """Move the bar, and change texts beside it; nothing where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **texts)

    def line(self, text: str) -> None:
        """Print the label and a result where there is no bar."""
        if self._console is not None and self._bar is None:
            self._console.print(
                f"{self.label} {text}", highlight=False, markup=False, soft_wrap=True
            )

    def _show(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._bar = _bar(self._console, self._fields)
            empty: dict[str, Any] = dict.fromkeys(self._fields, "")
            self._task = self._bar.add_task(
                self.label, total=self.total, completed=self._done, **empty
            )

    def _remaining(self) -> float:
        """Seconds, if the steps to come are like those that were taken."""
        taken = self._done - self._before
        spent = time.monotonic() - self._start
        return spent / taken * (self.total - self._done) if taken > 0 else 0.0

    def _is_long(self) -> bool:
        spent = time.monotonic() - self._start
        return spent >= _SOONEST and spent + self._remaining() > self._patience

    def _left(self) -> str:
        return self._time_left() if self._patience else ""

    def _time_left(self) -> str:
        seconds = self._remaining()
        if self._done >= self.total:
            return ""
        left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f", about {left} left"


def _bar(console: Console, fields: tuple[str, ...]) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    texts = [TextColumn("{task.fields[" + name + "]}", markup=False) for name in fields]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts]
    return Progress(*columns, Remaining(), console=console)
