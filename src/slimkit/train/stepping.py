"""A training step: what is minimised, and by how many forwards and backwards.

The run (``training.py``) sets the learning rate, clears gradients, calls the step, clips and
updates. The step only has to leave gradients behind, by the tools it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.errors import InputError, TrainingError
from slimkit.inputs import Batch, ExampleInputs, as_inputs
from slimkit.outside import signalled
from slimkit.train.callbacks import StepContext

if TYPE_CHECKING:
    import contextlib

    from torch.optim import Optimizer

    from slimkit.train.devices import Device

__all__ = ["BatchLoss", "LossFunction", "Objective", "Step", "StepTools", "Term", "as_float"]

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(outputs, targets)`` → scalar."""

BatchLoss = Callable[[nn.Module, Batch], tuple[Tensor, Any]]
"""``batch_loss(model, batch)`` → (scalar, outputs): for a loss inside the model."""

Step = Callable[["StepTools", Batch], Any]
"""``step(tools, batch)`` → what callbacks see as outputs; None for those of the last forward."""

_NAMED_SAMPLES = 16
"""Samples that an error names: a batch of usual size wholly."""

Term = Callable[[StepContext], Tensor]
"""A further term of the loss, from what happened in a step."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how a step goes about it.

    Attributes:
        loss_fn: loss of (outputs, targets).
        batch_loss: loss of (model, batch); the one or the other.
        step: a step of one's own; None is one forward and one backward.
        terms: added to the loss.
        weight: of the loss beside the terms; 0 trains on those alone.

    Raises:
        InputError: nothing says what is minimised, or two things do.
    """

    loss_fn: LossFunction | None = None
    batch_loss: BatchLoss | None = None
    step: Step | None = None
    terms: Sequence[Term] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_fn is not None and self.batch_loss is not None:
            raise InputError(
                "loss_fn and batch_loss both say what is minimised",
                where="batch_loss",
                hint="pass one of them",
            )
        if self.loss_fn is None and self.batch_loss is None and self.step is None:
            raise InputError(
                "nothing says what is minimised",
                where="loss_fn",
                hint="pass loss_fn=, batch_loss= or step=",
            )


class StepTools:
    """What a training step is made of; a step of one's own gets it as its first argument.

    Args:
        model: the module being trained.
        forward: what is called for it: itself, or its wrapper across processes.
        objective: loss, terms and step.
        device: autocast and gradients.
        optimizer: for callbacks.

    Attributes:
        model: the module being trained, to be switched or read; call it by :meth:`forward`.
        step: number of optimizer steps before this one in the whole run.
        epoch: from 0.
        progress: part of the run that is over, 0 … 1.
        names_of: numbers of samples → their names, for errors; None where they have none.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: nn.Module,
        objective: Objective,
        device: Device,
        optimizer: Optimizer,
    ) -> None:
        self.model = model
        self.step, self.epoch, self.progress = 0, 0, 0.0
        self.bf16 = False
        self.names_of: Callable[[Tensor], Sequence[str]] | None = None
        self._forward, self._objective, self._device = forward, objective, device
        self._optimizer = optimizer
        self._share, self._looks, self._position = 1.0, True, ""
        self._outputs: Any = None
        self._loss: Tensor | None = None
        self._samples: Tensor | None = None
        self._scalars: dict[str, Tensor] = {}

    def forward(self, inputs: Batch | ExampleInputs) -> Any:
        """Call the model, under autocast; floating-point outputs in float32."""
        call = inputs.inputs if isinstance(inputs, Batch) else as_inputs(inputs)
        with self.autocast():
            self._outputs = as_float(call.run(self._forward))
        return self._outputs

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """``loss_fn`` of these outputs, weighted, and the terms of ``losses=``; a scalar.

        With neither a ``loss_fn`` nor terms it is 0: the step computes its own.

        Raises:
            InputError: the loss is inside the model (``batch_loss``).
        """
        objective = self._objective
        if objective.batch_loss is not None:
            raise InputError(
                "the loss is inside the model, it is none of outputs",
                where="step",
                hint="call tools.forward_loss(batch)",
            )
        with self.autocast():
            return self._total(outputs, batch)

    def forward_loss(self, batch: Batch) -> tuple[Tensor, Any]:
        """Forward and loss, whether the loss is inside the model or not → (loss, outputs)."""
        objective = self._objective
        with self.autocast():
            if objective.batch_loss is None:
                self._outputs = outputs = as_float(batch.inputs.run(self._forward))
                return self._total(outputs, batch), outputs
            answer: object = signalled(
                objective.batch_loss, TrainingError, "batch_loss", self._forward, batch
            )
            if not (isinstance(answer, tuple) and len(answer) == 2):
                raise TrainingError(
                    f"expected (loss, outputs), got {type(answer).__name__}", where="batch_loss"
                )
            own, self._outputs = answer[0], as_float(answer[1])
            terms = self._terms(self._outputs, batch)
            weighs = objective.weight or not terms
            return self._sum(own if weighs else None, terms), self._outputs

    def backward(self, loss: Tensor, weight: float = 1.0) -> None:
        """Add the gradients of ``weight`` · ``loss`` to those of the step, the first from nothing.

        What is logged as the step's loss is the sum of all that went through here.

        Raises:
            TrainingError: the loss is no finite scalar, or nothing that is trained led to it.
        """
        _check_scalar(loss)
        if not loss.requires_grad:
            raise TrainingError(
                "the loss does not depend on anything that is trained",
                where="loss",
                hint="compute it from the outputs, without detach(), item() or no_grad()",
            )
        detached = loss.detach()
        if self._looks:
            self._check_finite(detached)
        scale = weight * self._share
        if scale != 1:
            loss, detached = loss * scale, detached * scale
        if self._loss is None:  # the first of this step: the gradients of the last one go
            self._optimizer.zero_grad(set_to_none=True)
        self._device.backward(loss)
        self._loss = detached if self._loss is None else self._loss + detached

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a number: to TensorBoard as ``train/name``, its mean in the epoch's record."""
        number = torch.as_tensor(value, device=self._device.device).detach().float()
        self._scalars[name] = number

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the run, for what a step computes by itself."""
        return self._device.autocast(self.bf16)

    def context(self, batch: Batch, outputs: Any = None) -> StepContext:
        """What terms and callbacks get."""
        return StepContext(
            self.model, batch, outputs, self.step, self.epoch, self.progress, self._optimizer
        )

    def begin(self, step: int, epoch: int, total: int) -> None:
        """Another optimizer step begins."""
        self.step, self.epoch, self.progress = step, epoch, step / total
        self._position = f"step {step} of {total}"
        self._loss, self._scalars = None, {}

    def take(self, batch: Batch, share: float, looks: bool) -> Any:
        """Run the step on a batch → what callbacks see as outputs.

        Args:
            batch: on the device.
            share: of this batch in the optimizer step, 0 … 1.
            looks: whether the loss is compared with infinity, which waits for an accelerator.

        Raises:
            TrainingError: the step left no gradients.
        """
        self._share, self._looks, self._outputs = share, looks, None
        self._samples = batch.ids
        taken = self._loss
        if self._objective.step is None:
            loss, outputs = self.forward_loss(batch)
            self.backward(loss)
            self._outputs = None
            return outputs
        returned = signalled(self._objective.step, TrainingError, "step", self, batch)
        outputs, self._outputs = self._outputs, None
        if self._loss is taken:
            raise TrainingError(
                "the step left no gradients", where="step", hint="call tools.backward(loss)"
            )
        return outputs if returned is None else returned

    def trial(self, batch: Batch, bf16: bool) -> Tensor | None:
        """A loss of much the same cost as the real one, which touches the model alone.

        Whatever outputs there are, their squares are as good as any loss for timing, and a
        loss or a step that counts its calls is not disturbed. A loss inside the model is what
        it is.

        Returns:
            A scalar to go backward from; None where nothing in the outputs has gradients.
        """
        objective = self._objective
        with self._device.autocast(bf16):
            if objective.batch_loss is not None:
                return signalled(
                    objective.batch_loss, TrainingError, "batch_loss", self._forward, batch
                )[0]
            outputs = as_float(batch.inputs.run(self._forward))
            parts = [leaf.square().mean() for leaf in tree_leaves(outputs) if _learns(leaf)]
            return torch.stack(parts).sum() if parts else None

    def results(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the step so far, and what it logged."""
        loss = torch.zeros((), device=self._device.device) if self._loss is None else self._loss
        return loss, self._scalars

    def _total(self, outputs: Any, batch: Batch) -> Tensor:
        """The terms, and the loss of these outputs where it counts."""
        objective = self._objective
        terms = self._terms(outputs, batch)
        own = None
        if objective.loss_fn is not None and (objective.weight or not terms):
            own = signalled(objective.loss_fn, TrainingError, "loss_fn", outputs, batch.targets)
        return self._sum(own, terms)

    def _terms(self, outputs: Any, batch: Batch) -> list[Tensor]:
        if not self._objective.terms:
            return []
        context = self.context(batch, outputs)
        return [
            signalled(term, TrainingError, f"losses.{number}", context)
            for number, term in enumerate(self._objective.terms)
        ]

    def _sum(self, own: Tensor | None, terms: list[Tensor]) -> Tensor:
        parts = list(terms)
        if own is not None:
            _check_scalar(own)
            weight = self._objective.weight
            parts.append(own if weight == 1 else weight * own)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.zeros((), device=self._device.device)
        return torch.stack([part.float().reshape(()) for part in parts]).sum()

    def _check_finite(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss)):
            rate = self._optimizer.param_groups[0]["lr"]
            raise TrainingError(
                f"the loss is {float(loss)} at {self._position}{self._named_samples()}",
                where="loss",
                hint=f"the learning rate is {rate:.3g}: try a lower lr, "
                "warmup_epochs or clip_grad_norm",
            )

    def _named_samples(self) -> str:
        """Which samples the batch has: by name, else by number, else nothing."""
        if self._samples is None:
            return ""
        numbers = self._samples.flatten()[:_NAMED_SAMPLES].cpu()
        names = self.names_of(numbers) if self.names_of is not None else numbers.tolist()
        more = len(self._samples) - len(numbers)
        shown = ", ".join(map(str, names)) + (f" and {more} more" if more else "")
        return f", in the batch of samples {shown}"


def as_float(outputs: Any) -> Any:
    """bf16 outputs as float32: losses need the digits."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs

    def on_leaf(leaf: Any) -> Any:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(on_leaf, outputs)


def _learns(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()


def _check_scalar(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(f"expected a scalar tensor, got {found}", where="loss")
