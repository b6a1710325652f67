"""Training batches and a loss, for criteria that look at gradients.

Batches are an iterable that can be read again and gives what :func:`slimkit.inputs.as_batch`
reads: ``(inputs, targets)``, where inputs are a tensor, a tuple of arguments, a mapping of
keywords, a list of images or :class:`slimkit.Inputs`. The loss is ``loss(outputs, targets)``, the
mean over the samples of a batch; or, where it is inside the model (a torchvision detector), a
:class:`slimkit.inputs.LossOfBatch`, whose model is then in training mode but for its batch
normalization and dropout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import DataError, InputError, SlimkitError
from slimkit.graph.isolation import training_flags, undisturbed
from slimkit.inputs import Batch, LossOfBatch, as_batch
from slimkit.modules import copy_module
from slimkit.outside import iterated

__all__ = ["Batches", "Loss", "each_batch", "evaluated_copy", "loss_of", "samples_of"]

Batches = Iterable[Any]
"""Training batches that can be iterated more than once."""

Loss = Callable[[Any, Any], Tensor] | LossOfBatch
"""Outputs and targets → a scalar, the mean over the samples; or a loss inside the model."""


@contextmanager
def evaluated_copy(model: nn.Module, loss: Loss) -> Iterator[nn.Module]:
    """A copy whose parameters need no gradients, with random numbers of its own.

    It is in evaluation mode, or for a loss inside the model in what
    :func:`~slimkit.graph.isolation.training_flags` makes of training mode.
    """
    twin = copy_module(model).requires_grad_(False)
    with (
        undisturbed(twin),
        training_flags(twin) if isinstance(loss, LossOfBatch) else nullcontext(),
        torch.enable_grad(),
    ):
        yield twin


def each_batch(batches: Batches, model: nn.Module, limit: int | None) -> Iterator[Batch]:
    """Copies of the batches on the device of ``model``.

    Args:
        batches: see above.
        model: whose device.
        limit: at most so many; None for all.

    Raises:
        InputError: nothing to iterate, no batches, or one of another form.
        DataError: they are the test split.
    """
    if getattr(batches, "role", None) == "test":
        raise DataError(
            "the test split must not decide what is pruned", where="batches", hint="splits.train"
        )
    if not isinstance(batches, Iterable):
        raise InputError(f"expected batches, got {type(batches).__name__}", where="batches")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    count = 0
    for item in itertools.islice(iterated(batches, where="batches"), limit):
        batch = as_batch(item, where=f"batches[{count}]")
        count += 1
        yield batch.map(lambda tensor: tensor.detach().to(device, copy=True))
    if not count:
        raise InputError(
            "there are no batches",
            where="batches",
            hint="give a list or a loader: an iterator is empty when it was read before",
        )


def loss_of(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The loss on one batch, checked.

    Raises:
        InputError: the model or the loss fails on it, or the loss is no finite scalar, or
            nothing that requires gradients led to it.
    """
    value = _outcome(model, batch, loss)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"expected a scalar tensor, got {shape}", where="loss")
    if not bool(torch.isfinite(value)):
        raise InputError(
            f"the loss is {float(value.detach())}",
            where="loss",
            hint="check the weights, and that the batches are prepared as for training",
        )
    if not value.requires_grad:
        raise InputError(
            "the loss does not depend on the model's parameters",
            where="loss",
            hint="compute it from the outputs, without detach(), item() or no_grad()",
        )
    return value.reshape(())


def _outcome(model: nn.Module, batch: Batch, loss: Loss) -> object:
    from slimkit.train.stepping import as_float

    try:
        if isinstance(loss, LossOfBatch):
            return loss.function(model, batch)[0]
        return loss(as_float(batch.inputs.call(model)), batch.targets)
    except SlimkitError:
        raise
    except Exception as error:
        bare = batch.targets is None and not isinstance(loss, LossOfBatch)
        raise InputError(
            f"a batch or the loss fails with {type(error).__name__}: {error}",
            where="batches",
            hint="the batches have no targets: give (inputs, targets)" if bare else None,
        ) from error


def samples_of(batch: Batch) -> list[Batch]:
    """The samples of a batch, as batches of one.

    Raises:
        InputError: they cannot be told apart.
    """
    if batch.size in (None, 1):
        return [batch]
    if batch.inputs.examples is None:
        raise InputError(
            f"the inputs cannot be taken apart into {batch.size} samples",
            where="batches",
            hint="give batches of one sample",
        )
    return batch.split(1)
