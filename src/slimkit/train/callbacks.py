"""What the loop tells those who take part in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from slimkit.inputs import Batch

__all__ = ["Callback", "EpochContext", "StepContext"]


@dataclass(frozen=True, slots=True)
class StepContext:
    """One training step.

    Attributes:
        model: the module being trained.
        batch: of the loader, on the model's device.
        outputs: what the model returned, in float32; what a step of one's own returned, or its
            last forward. None before the forward (``on_step_begin``).
        step: number of optimizer steps before this one in the whole run.
        epoch: from 0.
        progress: part of the run that is over, 0 … 1.
        optimizer: of the run.
    """

    model: nn.Module
    batch: Batch
    outputs: Any
    step: int
    epoch: int
    progress: float
    optimizer: Optimizer | None = None

    @property
    def inputs(self) -> Any:
        """What the model is called with, as the loader gave it; images are (N, C, H, W)."""
        return self.batch.inputs.plain

    @property
    def targets(self) -> Any:
        """What belongs to the inputs: labels (N,), or any other structure; None without any."""
        return self.batch.targets

    @property
    def ids(self) -> Tensor | None:
        """Numbers of the samples (N,), the same in every epoch; None where unknown."""
        return self.batch.ids


@dataclass(frozen=True, slots=True)
class EpochContext:
    """The end of an epoch.

    Attributes:
        model: the module being trained (not its moving average).
        optimizer: with its current state.
        epoch: from 0.
        step: optimizer steps so far.
        record: the history's entry: loss, lr, seconds, images_per_second, metrics; scalars
            where a step logs any.
    """

    model: nn.Module
    optimizer: Optimizer
    epoch: int
    step: int
    record: dict[str, Any]


class Callback:
    """Override what you need; the rest does nothing.

    Of one optimizer step: ``on_step_begin`` of every callback, forward and backward,
    ``optimizer.step()``, ``on_update`` of every callback, ``on_step_end`` of every callback,
    then the moving average of the weights.

    A callback that keeps something between steps returns it from ``state_dict()``, as tensors
    or JSON by name, and takes it in ``load_state_dict(state)``: it is then part of the
    checkpoint.
    """

    def on_step_begin(self, context: StepContext) -> None:
        """Before the forward; the learning rate of the step is set, outputs are not known."""

    def on_update(self, context: StepContext) -> None:
        """Right after ``optimizer.step()``: the place for what changes weights, such as masks.

        Gradients are still there. The moving average takes in what comes out.
        """

    def on_step_end(self, context: StepContext) -> None:
        """After ``optimizer.step()`` and every ``on_update``, before the moving average."""

    def on_epoch_end(self, context: EpochContext) -> None:
        """After evaluation and before the checkpoint."""
