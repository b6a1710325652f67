"""What the loop tells those who take part in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Callback", "EpochContext", "StepContext"]


@dataclass(frozen=True, slots=True)
class StepContext:
    """One training step, after the model's forward.

    Attributes:
        model: the module being trained.
        inputs: images (N, C, H, W) on the model's device.
        targets: labels (N,).
        outputs: what the model returned, in float32.
        step: number of optimizer steps before this one in the whole run.
        epoch: from 0.
        progress: part of the run that is over, 0 … 1.
        ids: numbers of the samples (N,), the same in every epoch; None where the loader does
            not tell them.
    """

    model: nn.Module
    inputs: Any
    targets: Tensor
    outputs: Any
    step: int
    epoch: int
    progress: float
    ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EpochContext:
    """The end of an epoch.

    Attributes:
        model: the module being trained (not its moving average).
        optimizer: with its current state.
        epoch: from 0.
        step: optimizer steps so far.
        record: the history's entry: loss, lr, seconds, images_per_second, metrics.
    """

    model: nn.Module
    optimizer: Optimizer
    epoch: int
    step: int
    record: dict[str, Any]


class Callback:
    """Override what you need; the rest does nothing.

    A callback that keeps tensors between steps returns them from ``state_dict()`` and takes
    them in ``load_state_dict(tensors)``: they are then part of the checkpoint.
    """

    def on_step_end(self, context: StepContext) -> None:
        """After ``optimizer.step()``."""

    def on_epoch_end(self, context: EpochContext) -> None:
        """After evaluation and before the checkpoint."""
