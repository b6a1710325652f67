"""What a person sees of a training, and what TensorBoard gets."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slimkit.progress import ProgressDisplay

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Scalars", "TrainingDisplay"]


class TrainingDisplay(ProgressDisplay):
    """Progress of a training: the bar moves by steps, results come by epochs."""

    def __init__(self, total: int, done: int, *, label: str, enabled: bool) -> None:
        fields = ("loss", "metric", "speed")
        super().__init__(total, done, label=label, enabled=enabled, fields=fields)

    def batch(self, done: int, loss: float, images_per_second: float) -> None:
        """A step was taken."""
        speed = f"{images_per_second:,.0f} img/s"
        self.update(done, loss=f"loss {loss:.3f}", speed=speed)

    def epoch(self, record: Mapping[str, Any], epochs: float) -> None:
        """Show the result of an epoch."""
        metrics = " ".join(f"{name} {value:.2f}" for name, value in record["metrics"].items())
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
