"""Recording what modules put out during a forward, without editing the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimkit.errors import ModelError, UnknownNameError, nearest
from slimkit.inputs import Inputs

__all__ = ["Recorder", "check_layers", "main_tensor", "probing", "run"]


def main_tensor(output: Any, *, where: str) -> Tensor:
    """The tensor that an output is about: itself, its ``logits`` or ``out``, or its first tensor.

    Args:
        output: a tensor, a Hugging Face ``ModelOutput``, a named tuple, a dict, a tuple or list.
        where: whose output it is, for the error.

    Raises:
        ModelError: there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out"):
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Iterable):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise ModelError(f"no tensor in the output, a {type(output).__name__}", where=where)


def check_layers(model: nn.Module, layers: Iterable[str], *, who: str) -> None:
    """Make sure that every path names a module of ``model``.

    Args:
        model: the student or the teacher.
        layers: module paths.
        who: ``"student"`` or ``"teacher"``, for the error.

    Raises:
        UnknownNameError: with the nearest module paths.
    """
    known = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if layer not in known:
            raise UnknownNameError(
                f"the {who} {type(model).__name__} has no layer {layer!r}",
                where=who,
                hint=nearest(layer, known),
            )


class Recorder:
    """Keeps the outputs of some modules of one model from its latest forward.

    A record is a copy, so that an in-place operator that follows the module (an in-place
    ReLU after a batch norm) does not change it. A module that runs several times in one
    forward leaves its last output. Deep copies of the model (an EMA average) are not recorded.

    Args:
        model: the model; gets forward hooks until :meth:`close`.
        layers: module paths; ``""`` for the model's own output.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self.records: dict[str, Tensor] = {}
        modules = dict(model.named_modules())
        self._handles: list[RemovableHandle] = [
            self._attach(modules[layer], layer) for layer in sorted(set(layers))
        ]

    def _attach(self, module: nn.Module, layer: str) -> RemovableHandle:
        records = self.records

        # a closure, not a method: deep copies of the model share it instead of copying us
        def record(caller: nn.Module, _args: Any, output: Any) -> None:
            if caller is module:
                records[layer] = main_tensor(output, where=layer or type(module).__name__).clone()

        return module.register_forward_hook(record)

    def clear(self) -> None:
        """Forget all records (they hold memory and the autograd graph)."""
        self.records.clear()

    def close(self) -> None:
        """Remove the hooks and forget the records."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's training flag is restored after."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def run(model: nn.Module, inputs: Inputs, *, who: str) -> Any:
    """``model(inputs)``, with an error that says whose forward failed.

    Raises:
        ModelError: the forward raises.
    """
    try:
        return inputs.call(model)
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(f"its forward fails on these inputs: {error}", where=who) from error
