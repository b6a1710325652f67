"""What a person sees of a training, and what TensorBoard gets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slimkit.errors import ArtifactError
from slimkit.progress import ProgressDisplay

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Scalars", "TrainingDisplay"]


LINE_SECONDS = 30.0
"""Between two lines within an epoch where there is no bar: often enough to see that it lives."""


class TrainingDisplay(ProgressDisplay):
    """Progress of a training: the bar moves by steps, results come by epochs.

    Where there is no bar, an epoch that takes long has lines of its own.
    """

    def __init__(self, total: int, done: int, *, label: str, enabled: bool) -> None:
        fields = ("loss", "metric", "speed")
        super().__init__(total, done, label=label, enabled=enabled, fields=fields)

    def due(self) -> bool:
        """Whether it is time for a line within the epoch."""
        waited = time.monotonic() - self._last
        return self._console is not None and self._bar is None and waited >= LINE_SECONDS

    def batch(self, done: int, loss: float, images_per_second: float) -> None:
        """A step was taken."""
        self._done = done
        speed = f"{images_per_second:,.0f} img/s"
        self.update(done, loss=f"loss {loss:.3f}", speed=speed)
        if self.due():
            self._last = time.monotonic()
            self.line(f"step {done}/{self.total} loss {loss:.3f} {speed}{self._time_left()}")

    def fitted(self, total: int) -> None:
        """The run turns out to have so many steps."""
        self.total = total
        self.update(total=total)

    def warn(self, text: str) -> None:
        """Say what is not as it should be, whether there is a bar or not."""
        if self._console is not None:
            self._console.print(
                f"{self.label} warning: {text}", style="yellow", highlight=False, markup=False
            )

    def epoch(self, record: Mapping[str, Any], epochs: float) -> None:
        """Show the result of an epoch."""
        metrics = " ".join(f"{name} {value:.2f}" for name, value in record["metrics"].items())
        self._last = time.monotonic()
        self.update(metric=metrics)
        self.line(
            f"epoch {record['epoch'] + 1}/{epochs:g} loss {record['loss']:.4f} "
            f"{metrics} {record['images_per_second']:,.0f} img/s {record['seconds']:.1f} s"
        )


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

            try:
                self._writer = SummaryWriter(str(folder), purge_step=step or None)
            except OSError as error:
                raise ArtifactError(
                    f"TensorBoard cannot write there: {error.strerror or error}", where=str(folder)
                ) from error

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
