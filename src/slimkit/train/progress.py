"""What a person sees of a run: a live bar in a terminal, one line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Display", "Scalars"]


class Display:
    """Progress on standard error.

    Args:
        total: steps of the run.
        done: steps done before it was resumed.
        label: what is being trained.
        enabled: False shows nothing.
    """

    def __init__(self, total: int, done: int, *, label: str, enabled: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._enabled = enabled
        self._label = label
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(
                label, total=total, completed=done, loss="", metric="", speed=""
            )

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

    def step(self, done: int, loss: float, images_per_second: float) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=done,
                loss=f"loss {loss:.3f}",
                speed=f"{images_per_second:,.0f} img/s",
            )

    def epoch(self, record: Mapping[str, Any], epochs: float) -> None:
        """Show the result of an epoch."""
        metrics = " ".join(f"{name} {value:.2f}" for name, value in record["metrics"].items())
        if self._bar is not None:
            self._bar.update(self._task, metric=metrics)
        elif self._enabled:
            self._console.print(
                f"{self._label} epoch {record['epoch'] + 1}/{epochs:g} loss {record['loss']:.4f} "
                f"{metrics} {record['images_per_second']:,.0f} img/s {record['seconds']:.1f} s",
                highlight=False,
                soft_wrap=True,
            )


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    fields = [TextColumn("{task.fields[" + name + "]}") for name in ("loss", "metric", "speed")]
    return Progress(*columns, *fields, Remaining(), console=console)


class Scalars:
    """TensorBoard scalars, or nothing without a folder.

    Args:
        folder: where the event files go.
        step: steps already done; later ones in the folder are discarded on resume.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step or None)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write some scalars."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
