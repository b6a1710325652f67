"""Progress on standard error: a live bar in a terminal, a line per result elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["ProgressDisplay"]


class ProgressDisplay:
    """Progress on standard error.

    Args:
        total: steps in all.
        done: steps done before it was resumed.
        label: what is going on.
        enabled: False shows nothing.
        fields: names of the texts beside the bar, set by :meth:`update`.
    """

    def __init__(
        self,
        total: int,
        done: int,
        *,
        label: str,
        enabled: bool,
        fields: tuple[str, ...] = ("news",),
    ) -> None:
        from rich.console import Console

        self.label, self.total = label, total
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = _bar(self._console, fields)
            empty: dict[str, Any] = dict.fromkeys(fields, "")
            self._task = self._bar.add_task(label, total=total, completed=done, **empty)

    def __enter__(self) -> Self:
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
        self.update(done, news=news)
        self.line(f"{done}/{self.total} {news}")

    def update(self, done: int | None = None, **texts: Any) -> None:
        """Move the bar, and change texts beside it; nothing where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, **texts)

    def line(self, text: str) -> None:
        """Print the label and a result where there is no bar."""
        if self._enabled and self._bar is None:
            self._console.print(
                f"{self.label} {text}", highlight=False, markup=False, soft_wrap=True
            )


def _bar(console: Console, fields: tuple[str, ...]) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    texts = [TextColumn("{task.fields[" + name + "]}", markup=False) for name in fields]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts]
    return Progress(*columns, Remaining(), console=console)
