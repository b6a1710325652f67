"""Recording tensors of a forward, without editing the model."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slimkit.distill.recording.intercepting import ForwardScope, Handler, Interceptor
from slimkit.distill.recording.records import Tap, tap_of
from slimkit.errors import ModelError
from slimkit.inputs import Inputs
from slimkit.modules import evaluation

__all__ = ["Recorder", "main_tensor", "probing", "run"]


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


class Recorder:
    """Keeps some tensors of one model from its latest forward.

    A record is a copy, so that an in-place operator that follows the module (an in-place
    ReLU after a batch norm) does not change it; only parameters are the live ones. A module or
    function that runs several times in one forward leaves its last output unless the tap says
    which. Deep copies of the model (an EMA average) are not recorded. Functions are wrapped
    while the model's forward runs, and are themselves again when it ends.

    Args:
        model: the model; gets forward hooks until :meth:`close`.
        layers: module paths (``""`` for the model's own output) or taps.

    Attributes:
        records: :attr:`Tap.key` → tensor, of the latest forward.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str | Tap]) -> None:
        taps = sorted({tap_of(layer) for layer in layers}, key=lambda tap: tap.key)
        self.records: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        modules = dict(model.named_modules(remove_duplicate=False))
        self._handles: list[RemovableHandle] = [
            self._attach(modules[tap.name], tap) for tap in taps if tap.kind == "module"
        ]
        self._interceptor = Interceptor(self._handlers(taps))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._live = {tap.key: parameters[tap.name] for tap in taps if tap.kind == "parameter"}
        self._scope: ForwardScope | None = None
        if self._live or self._interceptor.handlers or any(tap.call != -1 for tap in taps):
            self._scope = ForwardScope(model, self._enter, self._leave)

    def _attach(self, module: nn.Module, tap: Tap) -> RemovableHandle:
        keep = self._keeper(tap)
        # closures, not methods: deep copies of the model share them instead of copying us
        if tap.part == "input":

            def before(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if caller is module:
                    keep({**dict(enumerate(args)), **kwargs})

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(caller: nn.Module, _args: Any, output: Any) -> None:
            if caller is module:
                keep(output)

        return module.register_forward_hook(after)

    def _handlers(self, taps: Sequence[Tap]) -> dict[str, Handler]:
        keepers: dict[str, list[Callable[[Any], None]]] = {}
        for tap in taps:
            if tap.kind == "function":
                keepers.setdefault(tap.name, []).append(self._keeper(tap))

        def handler(keepers: list[Callable[[Any], None]]) -> Handler:
            def answer(call: Callable[[], Any]) -> Any:
                value = call()
                for keep in keepers:
                    keep(value)
                return value

            return answer

        return {name: handler(found) for name, found in keepers.items()}

    def _keeper(self, tap: Tap) -> Callable[[Any], None]:
        records, calls = self.records, self._calls

        def keep(value: Any) -> None:
            if tap.call != -1:
                calls[tap.key] += 1
                if calls[tap.key] != tap.call + 1:
                    return
            records[tap.key] = _picked(value, tap).clone()

        return keep

    def _enter(self, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self._interceptor.start()  # not where another thread is in the middle of it
        self._calls.clear()

    def _leave(self) -> None:
        self._interceptor.stop()
        self.records.update(self._live)

    def clear(self) -> None:
        """Forget all records (they hold memory and the autograd graph)."""
        self.records.clear()

    def close(self) -> None:
        """Remove the hooks and forget the records."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._scope is not None:
            self._scope.close()
        self._interceptor.stop(of_any_thread=True)
        self.clear()


def _picked(value: Any, tap: Tap) -> Tensor:
    """The tensor that a tap means."""
    where = tap.key or "the network"
    if tap.index is None:
        return main_tensor(value, where=where)
    try:
        found = value[tap.index]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, Tensor):
        kind = type(value).__name__ if tap.part == "output" else "call"
        raise ModelError(f"there is no tensor {tap.index!r} in it, a {kind}", where=where)
    return found


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; every module's training flag is restored after."""
    with evaluation(model), torch.no_grad():
        yield


def run(model: nn.Module, inputs: Inputs, *, who: str) -> Any:
    """``model(inputs)``, with an error that says whose forward failed.

    Raises:
        ModelError: the forward raises.
    """
    try:
        return inputs.call(model)
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(f"its forward fails on these inputs: {error}", where=who) from error
