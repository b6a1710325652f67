"""Flat names for what goes into and comes out of a network.

A runtime knows a list of named tensors; a PyTorch network takes and returns any nesting of
tuples, dictionaries and dataclasses. Export and parity use the same flattening, so that the
n-th output of one is the n-th output of the other.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from slimkit.errors import ExportError
from slimkit.inputs import Inputs, as_inputs
from slimkit.runtime.attention_shapes import FourDimensionalAttention

__all__ = [
    "FlatModel",
    "batch_inputs",
    "batched_positions",
    "default_input_names",
    "default_output_names",
    "named_outputs",
]


class FlatModel(nn.Module):
    """``model`` as a function from a flat list of tensors to a flat list of tensors.

    Args:
        model: any module; it is not copied.
        inputs: one call; its tensors become the arguments, all else is held constant.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._structure = tree_flatten((inputs.args, dict(inputs.kwargs)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model; ``tensors`` in the order of ``Inputs.tensors()``."""
        with FourDimensionalAttention():  # the exporter knows no other
            return tuple(tensor for _, tensor in named_outputs(self.call(*tensors)))

    def call(self, *tensors: Tensor) -> Any:
        """The same with the outputs as the model returns them."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(x, Tensor) else x for x in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self.model(*args, **kwargs)


def named_outputs(outputs: Any) -> list[tuple[str, Tensor]]:
    """All tensors in ``outputs`` with the path at which they were found.

    Numbers, strings and None are left out: they are not data that a runtime computes.

    Raises:
        ExportError: an object in there is neither a tensor nor a known container.
    """
    return [("_".join(path), tensor) for path, tensor in _walk(outputs, ())]


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, item in zip(value._fields, value, strict=True):
            yield from _walk(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, str(index)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), (*path, field.name))
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ExportError(
            f"the model returns a {type(value).__name__}, which holds tensors in a way that "
            "an ONNX file cannot",
            where="output" + "".join(f"[{key!r}]" for key in path),
            hint="return tensors, tuples, dictionaries or dataclasses of them",
        )


def default_output_names(named: Sequence[tuple[str, Tensor]]) -> list[str]:
    """``logits`` for one (N, classes) tensor, keys of a dictionary, else ``output0`` and so on."""
    if len(named) == 1 and not named[0][0]:
        tensor = named[0][1]
        return ["logits" if tensor.ndim == 2 and tensor.is_floating_point() else "output0"]
    return _unique(f"output{name}" if name[:1].isdigit() or not name else name for name, _ in named)


def default_input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """``input`` for one tensor, else the names of the parameters of ``forward``."""
    if len(inputs.tensors()) == 1:
        return ["input"]
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError:  # the call itself will fail with a better message
        bound = {"input": [*inputs.args, *inputs.kwargs.values()]}
    return _unique(_leaf_names(bound))


def _leaf_names(arguments: Mapping[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name
        else:
            leaves = [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]
            yield from (f"{name}{index}" for index in range(len(leaves)))


def _unique(names: Iterator[str] | Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        clean = re.sub(r"[^0-9A-Za-z_]", "_", name)
        count = 1
        candidate = clean
        while candidate in result:
            count += 1
            candidate = f"{clean}_{count}"
        result.append(candidate)
    return result


def batched_positions(inputs: Inputs) -> list[int]:
    """Positions in ``inputs.tensors()`` whose dimension 0 is the batch.

    Those are the tensors passed directly (not inside a list, whose members are single images)
    that agree with the first of them in dimension 0.
    """
    leaves, _ = tree_flatten((inputs.args, dict(inputs.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    direct = [v for v in (*inputs.args, *inputs.kwargs.values()) if isinstance(v, torch.Tensor)]
    sized = [tensor for tensor in direct if tensor.ndim > 0]
    if not sized:
        return []
    batch = sized[0].shape[0]
    chosen = {id(tensor) for tensor in sized if tensor.shape[0] == batch}
    return [index for index, tensor in enumerate(tensors) if id(tensor) in chosen]


def batch_inputs(batch: Any, count: int) -> Inputs:
    """The inputs in what a loader yields.

    Args:
        batch: a tensor, an :class:`Inputs`, a dictionary, or a tuple or list. Of a tuple, the
            first ``count`` members are inputs, the rest (labels) is ignored.
        count: inputs that the model takes.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(batch, list):
        batch = tuple(batch)
    if isinstance(batch, tuple) and len(batch) > count:
        batch = batch[:count]
    return as_inputs(batch)
