"""What a person sees of a search: a live bar in a terminal, one line per step elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Display"]


class Display:
    """Progress on standard error.

    Args:
        total: steps in all.
        done: steps done before it was resumed.
        label: what is being searched.
        enabled: False shows nothing.
    """

    def __init__(self, total: int, done: int, *, label: str, enabled: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._enabled = enabled
        self._label = label
        self._total = total
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(label, total=total, completed=done, news="")

    def __enter__(self) -> Display:
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
        """Show that so many steps are done, and what the last one gave."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, news=news)
        elif self._enabled:
            self._console.print(
                f"{self._label} {done}/{self._total} {news}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    news = TextColumn("{task.fields[news]}", markup=False)
    return Progress(*columns, news, Remaining(), console=console)
