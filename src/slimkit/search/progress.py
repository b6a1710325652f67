"""What a person sees of a search: a live bar in a terminal, one line per trial elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from slimkit.search.values import Trial

__all__ = ["Display"]


class Display:
    """Progress on standard error.

    Args:
        total: trials of the search.
        done: trials recorded before it was resumed.
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
            self._task = self._bar.add_task(label, total=total, completed=done, best="", last="")

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

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """Show a recorded trial and the best one so far."""
        last = trial.error if trial.value is None else f"{trial.value:.5g}"
        top = "" if best is None else f"best {best.value:.5g} (trial {best.number})"
        if self._bar is not None:
            self._bar.update(self._task, completed=trial.number + 1, best=top, last=f"last {last}")
        elif self._enabled:
            self._console.print(
                f"{self._label} trial {trial.number + 1}/{self._total} {last} {top} "
                f"{trial.seconds:.1f} s",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    fields = [TextColumn("{task.fields[" + name + "]}", markup=False) for name in ("best", "last")]
    return Progress(*columns, *fields, Remaining(), console=console)
