"""A module or a runtime session as the same thing: a function from inputs to outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.errors import InputError
from slimkit.graph.isolation import says_by_mode
from slimkit.inputs import Batch, Inputs
from slimkit.modules import evaluation, restored_flags
from slimkit.runtime.structure import named_feeds

if TYPE_CHECKING:
    from slimkit.runtime.sessions import Session
    from slimkit.tasks.interface import Task

__all__ = [
    "Run",
    "device_of",
    "in_training",
    "mean_loss",
    "module_run",
    "only_output",
    "session_run",
]

Run = Callable[[Inputs], Any]
"""Inputs of a model → its outputs."""


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter lies."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def module_run(model: nn.Module) -> Iterator[Run]:
    """``model`` in evaluation mode without gradients, on its own device; flags restored."""
    device = device_of(model)

    def run(inputs: Inputs) -> Any:
        with torch.no_grad():
            return inputs.to(device).run(model)

    with evaluation(model):
        yield run


def session_run(session: Session) -> Callable[[Inputs], dict[str, Tensor]]:
    """A file in its runtime: inputs → outputs by the names that they have in the file.

    Keyword arguments are handed on by name, everything else by position.
    """

    def run(inputs: Inputs) -> dict[str, Tensor]:
        arrays = session.run(named_feeds(inputs, session.input_names))
        return {
            name: torch.as_tensor(found)
            for name, found in zip(session.output_names, arrays, strict=True)
        }

    return run


@contextlib.contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode for a model that computes its loss in no other; flags restored.

    A model that is in evaluation mode (criteria of pruning, a validation loss) keeps batch
    norms and dropout there: its statistics do not move, and the loss is that of the network as
    it will be used.
    """
    if model.training:
        yield
        return
    with restored_flags(model):
        for module in model.modules():
            module.training = says_by_mode(module)
        yield


def mean_loss(task: Task, model: nn.Module, batches: Iterable[Batch]) -> float:
    """The loss of a network in evaluation mode, the mean over the batches' samples.

    That of :meth:`~slimkit.tasks.Task.evaluate`, or of the task's own forward where outputs and
    targets do not tell it.

    Raises:
        InputError: there is no batch.
    """
    held = list(batches)
    if task.loss_fn() is not None:
        scores = task.evaluate(model, held)
        if "loss" in scores:
            return scores["loss"]
    total, samples = 0.0, 0
    device = device_of(model)
    with evaluation(model), torch.no_grad():
        for batch in held:
            size = batch.size or 1
            total += float(task.loss(model, batch.to(device))[0]) * size
            samples += size
    if not samples:
        raise InputError("there is no batch", where="loader")
    return total / samples


def only_output(outputs: dict[str, Tensor]) -> Any:
    """The output of a file that has one; all by name where there are several.

    Raises:
        InputError: there is none.
    """
    if not outputs:
        raise InputError("the file has no output", where="model")
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
