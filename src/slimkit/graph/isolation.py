"""Isolation of a capture: the model is restored afterwards, and its attributes are watched."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from slimkit.graph.random_numbers import PrivateRandomNumbers
from slimkit.graph.sizes import TrackedInt, attribute_origin
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.locking import SharedSetting
from slimkit.modules import evaluation

if TYPE_CHECKING:
    from slimkit.graph.captured import Graph

__all__ = [
    "KeptParameters",
    "own_inputs",
    "tracked_attributes",
    "training_flags",
    "uncollected",
    "undisturbed",
]

_TORCH_OWN = frozenset(vars(nn.Module()))


def own_inputs(model: nn.Module, example_inputs: ExampleInputs) -> Inputs:
    """A copy of the inputs on the model's device: an in-place operator may overwrite them."""
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    return as_inputs(example_inputs).map(lambda t: t.detach().to(device, copy=True))


_collection = SharedSetting(
    gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable(), value=False
)
_fast_attention = SharedSetting(
    torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, value=False
)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for cyclic garbage.

    A graph is many small objects that all stay: looking through them, and through all of torch,
    again and again takes time and finds nothing.
    """
    with _collection.held():
        yield


@contextmanager
def undisturbed(model: nn.Module, *, seed: int | None = None) -> Iterator[None]:
    """Evaluation mode, no fused attention and random numbers of its own; the model restored.

    What the forward keeps in attributes (a cache of attention biases, say) is forgotten:
    channels that leave afterwards would not leave the cache. Random numbers of other threads
    stay as they are; see :class:`~slimkit.graph.random_numbers.PrivateRandomNumbers`.

    Args:
        model: what will run.
        seed: of its random numbers; None for those that would be next.
    """
    attributes = [_Attributes(vars(module)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with _fast_attention.held(), PrivateRandomNumbers(seed), evaluation(model):
            yield
    finally:
        for held in attributes:
            held.restore()
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
                module._buffers[name] = buffer


def says_by_mode(module: nn.Module) -> bool:
    """Whether a module may answer something else in training mode, such as its losses.

    Layers of torch itself, batch normalization and modules without parameters (dropout,
    stochastic depth, random resizing) answer the same, or noise.
    """
    layer = type(module).__module__.startswith("torch.nn.")
    holds = next(module.parameters(), None) is not None
    return holds and not layer and not isinstance(module, _NormBase)


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """Training mode, and random numbers that are the same every time; used in `undisturbed`.

    Layers of torch itself, batch normalization and modules without parameters (dropout,
    stochastic depth) stay in evaluation mode: they read the same tensors in both modes, and one
    example is too few for the statistics of a batch.
    The random states of Python and NumPy, which the process has once, are restored.
    """
    numbers, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with PrivateRandomNumbers(seed=0):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            for module in model.modules():
                module.training = says_by_mode(module)
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)  # noqa: NPY002


class KeptParameters:
    """Parameters that a forward writes to (a momentum encoder), with their values from before.

    A copy is made of one that is about to be written, and of no other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(parameter, parameter.data) for parameter in model.parameters()]
        self._by_storage = {_storage(data): data for _, data in self._parameters}
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}

    def before_write(self, tensors: Iterable[Tensor]) -> None:
        """Some of ``tensors`` will be overwritten."""
        for tensor in tensors:
            held = self._by_storage.get(_storage(tensor))
            if held is not None and id(held) not in self._saved:
                self._saved[id(held)] = held, held.clone()

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for held, saved in self._saved.values():
                held.copy_(saved)
        for parameter, data in self._parameters:
            if _storage(parameter) != _storage(data):
                parameter.data = data


def _storage(tensor: Tensor) -> int:
    """A number for the memory of a tensor, shared by its views."""
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


class _Attributes:
    """The plain attributes of a module, with a copy of those that are lists or dictionaries."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found
        self._values = {name: item for name, item in found.items() if name not in _TORCH_OWN}
        self._copies = {
            name: item.copy()
            for name, item in self._values.items()
            if type(item) in (dict, list, OrderedDict)
        }

    def restore(self) -> None:
        """Put everything back; what is new goes."""
        for name in [n for n in self._found if n not in _TORCH_OWN and n not in self._values]:
            del self._found[name]
        self._found.update(self._values)
        for name, copy in self._copies.items():
            held = self._values[name]
            if len(held) != len(copy) or any(a is not b for a, b in zip(held, copy, strict=True)):
                held.clear()
                if isinstance(held, list):
                    held.extend(copy)
                else:
                    held.update(copy)


@contextmanager
def tracked_attributes(model: nn.Module, graph: Graph) -> Iterator[None]:
    """Inside, whole-number attributes of modules remember that they are attributes."""
    numbers = {attribute: number for number, attribute in enumerate(graph.attributes)}

    def tracked(path: str, name: str, value: Any) -> Any:
        if type(value) is int and value > 1:
            number = numbers.setdefault((path, name, value), len(graph.attributes))
            if number == len(graph.attributes):
                graph.attributes.append((path, name, value))
            origin = attribute_origin(number)
            return TrackedInt(value, ((origin, 1),), graph.fixed)
        if type(value) in (list, tuple) and all(type(item) is int for item in value):
            items = (tracked(path, f"{name}[{i}]", item) for i, item in enumerate(value))
            return type(value)(items)
        return value

    plain: list[tuple[dict[str, Any], str, Any, Any]] = []
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        attributes = vars(module)
        for name, value in attributes.items():
            new = tracked(path, name, value) if name not in _TORCH_OWN else value
            if new is not value:
                plain.append((attributes, name, value, new))
    try:
        for attributes, name, _, new in plain:
            attributes[name] = new
        yield
    finally:
        for attributes, name, value, new in plain:
            if attributes.get(name) is new:  # the forward may have set another
                attributes[name] = value
