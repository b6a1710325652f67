"""Training batches and a loss, for criteria that look at gradients.

Batches are an iterable that can be read again and gives ``(inputs, targets)``; inputs are a
tensor, a tuple of arguments, a mapping of keywords or :class:`slimkit.Inputs`. The loss is
``loss(outputs, targets)``, the mean over the samples of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkit.errors import DataError, InputError, SlimkitError
from slimkit.graph.isolation import undisturbed
from slimkit.inputs import Inputs, as_batch
from slimkit.modules import copy_module

__all__ = [
    "Batch",
    "Batches",
    "Loss",
    "each_batch",
    "evaluated_copy",
    "loss_of",
    "sample_count",
    "samples_of",
]

Batch = tuple[Any, Any]
"""Inputs and targets."""

Batches = Iterable[Any]
"""Training batches, pairs of inputs and targets, that can be iterated more than once."""

Loss = Callable[[Any, Any], Tensor]
"""Outputs and targets → a scalar, the mean over the samples."""


@contextmanager
def evaluated_copy(model: nn.Module) -> Iterator[nn.Module]:
    """A copy in evaluation mode whose parameters need no gradients; random state restored."""
    twin = copy_module(model).requires_grad_(False)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with (
        undisturbed(twin),
        torch.random.fork_rng(devices=sorted(devices, key=str)),
        torch.enable_grad(),
    ):
        yield twin


def each_batch(batches: Batches, model: nn.Module, limit: int | None) -> Iterator[Batch]:
    """Copies of the batches on the device of ``model``.

    Raises:
        InputError: nothing to iterate, no batches, or one that is no pair.
        DataError: they are the test split.
    """
    if getattr(batches, "role", None) == "test":
        raise DataError(
            "the test split must not decide what is pruned", where="batches", hint="splits.train"
        )
    if not isinstance(batches, Iterable):
        raise InputError(f"expected batches, got {type(batches).__name__}", where="batches")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(leaf: Any) -> Any:
        return leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf

    count = 0
    for batch in itertools.islice(batches, limit):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(
                f"expected (inputs, targets), got {type(batch).__name__}",
                where=f"batches[{count}]",
            )
        inputs, targets = batch
        if isinstance(inputs, Inputs):
            inputs = inputs.map(moved)
        else:  # a mapping may be of a class that torch does not look into
            inputs = tree_map(moved, dict(inputs) if isinstance(inputs, Mapping) else inputs)
        count += 1
        yield inputs, tree_map(moved, targets)
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

    inputs, targets = batch
    try:
        outputs = as_batch((inputs, targets)).inputs.call(model)
        return loss(as_float(outputs), targets)
    except SlimkitError:
        raise
    except Exception as error:
        raise InputError(
            f"a batch or the loss fails with {type(error).__name__}: {error}", where="batches"
        ) from error


def samples_of(batch: Batch) -> list[Batch]:
    """The samples of a batch, as batches of one.

    Tensors and lists that are as long as the targets are taken apart; everything else goes
    with each sample.

    Raises:
        InputError: the inputs hold nothing of that length.
    """
    inputs, targets = batch
    count = sample_count(batch)
    if count == 1:
        return [batch]
    arguments = (inputs.args, dict(inputs.kwargs)) if isinstance(inputs, Inputs) else inputs
    if not any(_is_long(leaf, count) for leaf in _leaves(arguments, count)):
        raise InputError(
            f"the inputs cannot be taken apart into {count} samples",
            where="batches",
            hint="give batches of one sample",
        )
    return [(_sample(inputs, i, count), _sample(targets, i, count)) for i in range(count)]


def sample_count(batch: Batch) -> int:
    """How many samples a batch has: the length of the targets, else of the inputs."""
    for part in reversed(batch):
        if isinstance(part, list):
            return len(part)
        tree = (part.args, dict(part.kwargs)) if isinstance(part, Inputs) else part
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.dim():
                return len(leaf)
    return 1


def _is_long(leaf: Any, count: int) -> bool:
    long = isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.dim() > 0)
    return long and len(leaf) == count


def _leaves(tree: Any, count: int) -> list[Any]:
    """Tensors, and lists with one entry per sample."""
    return tree_leaves(tree, is_leaf=lambda node: isinstance(node, list) and _is_long(node, count))


def _sample(tree: Any, index: int, count: int) -> Any:
    if isinstance(tree, Inputs):
        return Inputs(*_sample((tree.args, dict(tree.kwargs)), index, count))

    def pick(leaf: Any) -> Any:
        return leaf[index : index + 1] if _is_long(leaf, count) else leaf

    return tree_map(
        pick, tree, is_leaf=lambda node: isinstance(node, list) and _is_long(node, count)
    )
