"""Flat names for what goes into and comes out of a network.

A runtime knows a list of named tensors; a PyTorch network takes and returns any nesting of
tuples, dictionaries and dataclasses. Export and parity use the same flattening, so that the
n-th output of one is the n-th output of the other.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from slimkit.errors import ExportError
from slimkit.inputs import Inputs, as_batch, tensors_of
from slimkit.runtime.attention_shapes import FourDimensionalAttention

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "FlatModel",
    "batch_inputs",
    "batched_positions",
    "default_input_names",
    "default_output_names",
    "in_signature_order",
    "named_feeds",
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
        self._inputs = inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the model; ``tensors`` in the order of ``Inputs.tensors()``."""
        with FourDimensionalAttention():  # the exporter knows no other
            return tuple(tensor for _, tensor in named_outputs(self.call(*tensors)))

    def call(self, *tensors: Tensor) -> Any:
        """The same with the outputs as the model returns them."""
        rest = iter(tensors)
        return self._inputs.map(lambda _: next(rest)).call(self.model)


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


def in_signature_order(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same call with its keywords in the order of the parameters of ``forward``.

    So the order of a dictionary decides nothing. Keywords that ``forward`` takes as ``**kwargs``
    come last, by name.
    """
    known = {name: position for position, name in enumerate(_parameters(model))}
    names = sorted(inputs.kwargs, key=lambda name: (known.get(name, len(known)), name))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


def default_input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """``input`` for one tensor, else the names of the parameters of ``forward``."""
    if len(inputs.tensors()) == 1:
        return ["input"]
    parameters = [name for name in _parameters(model) if name not in inputs.kwargs]
    parameters += [f"input{number}" for number in range(len(parameters), len(inputs.args))]
    arguments = [*zip(parameters, inputs.args, strict=False), *inputs.kwargs.items()]
    return _unique([name for pair in arguments for name in _leaf_names(*pair)])


def _parameters(model: nn.Module) -> list[str]:
    """Parameters of ``forward``; a wrapper's that hands all on are those of what it wraps."""
    kinds = inspect.Parameter
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted module may have none to show
        return []
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module) and all(
        p.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD) for p in found
    ):
        return _parameters(inner)
    return [p.name for p in found if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]


def _leaf_names(name: str, value: Any) -> list[str]:
    """The argument's own name for a tensor; numbered for those nested in it."""
    if isinstance(value, Tensor):
        return [name]
    return [f"{name}{index}" for index, _ in enumerate(tensors_of(value))]


def _unique(names: Iterable[str]) -> list[str]:
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

    Those are the tensors passed directly that agree with the first of them in dimension 0. A
    list of images counts by its length, which a file cannot leave open; then there are none.
    """
    arguments = [*inputs.args, *inputs.kwargs.values()]
    if any(isinstance(value, list) and list(tensors_of(value)) for value in arguments):
        return []
    sizes = [len(value) for value in arguments if isinstance(value, Tensor) and value.dim()]
    positions, found = 0, []
    for value in arguments:
        if isinstance(value, Tensor) and value.dim() and len(value) == sizes[0]:
            found.append(positions)
        positions += sum(1 for _ in tensors_of(value))
    return found


def batch_inputs(batch: Any, count: int) -> Inputs:
    """The inputs in what a loader yields, see :func:`slimkit.inputs.as_batch`.

    Args:
        batch: a tensor, a dictionary, :class:`Inputs`, a whole call with targets, or a tuple or
            list whose first ``count`` members are the inputs and the rest labels.
        count: tensors that the file takes.

    Raises:
        InputError: it is none of these.
    """
    example = None
    if isinstance(batch, (list, tuple)) and batch:
        first = list(tensors_of(batch[0]))
        if isinstance(batch[0], Tensor) or len(first) != count:
            example = Inputs((None,) * count)
    return as_batch(batch, example, where="batches").inputs


def named_feeds(inputs: Inputs, names: Sequence[str]) -> dict[str, Array] | list[Array]:
    """Arrays for a file with the inputs ``names``: keywords by their name, in whatever order.

    Returns:
        A list, in the order of ``names``, where all is passed by position or there is but one.
    """
    tensors = inputs.tensors()
    if not inputs.kwargs or len(tensors) == 1:
        return [_array(tensor) for tensor in tensors]
    feeds = dict(zip(names, map(_array, tensors_of(inputs.args)), strict=False))
    for key, value in inputs.kwargs.items():
        arrays = map(_array, tensors_of(value))
        feeds.update(zip(_leaf_names(key, value), arrays, strict=True))
    return feeds


def _array(tensor: Tensor) -> Array:
    return tensor.detach().cpu().numpy()
