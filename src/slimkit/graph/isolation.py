"""Isolation of a capture: the model is restored afterwards, and its attributes are watched."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimkit.graph.sizes import TrackedInt, attribute_origin
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.modules import evaluation

if TYPE_CHECKING:
    from slimkit.graph.capturing import Graph

__all__ = ["own_inputs", "tracked_attributes", "uncollected", "undisturbed"]

_TORCH_OWN = frozenset(vars(nn.Module()))


def own_inputs(model: nn.Module, example_inputs: ExampleInputs) -> Inputs:
    """A copy of the inputs on the model's device: an in-place operator may overwrite them."""
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    return as_inputs(example_inputs).map(lambda t: t.detach().to(device, copy=True))


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for cyclic garbage.

    A graph is many small objects that all stay: looking through them, and through all of torch,
    again and again takes time and finds nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no fused attention inside; the model and the random state restored.

    What the forward keeps in attributes (a cache of attention biases, say) is forgotten:
    channels that leave afterwards would not leave the cache.
    """
    attributes = [_Attributes(vars(module)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    random_state = torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_rng_state(random_state)
        for held in attributes:
            held.restore()
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)
                module._buffers[name] = buffer


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

    def tracked(path: str, name: str, value: Any) -> Any:
        if type(value) is int and value > 1:
            graph.attributes.append((path, name, value))
            origin = attribute_origin(len(graph.attributes) - 1)
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
