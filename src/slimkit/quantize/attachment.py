"""Attachment: a mode in which a network's calls round what its plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from slimkit.errors import AddressError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.functions import function_of
from slimkit.graph.recomputation import Recomputable, inside_checkpoint, note_run, region
from slimkit.quantize.integer.activations import GATES
from slimkit.quantize.integer.calls import IntegerCall
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer

if TYPE_CHECKING:
    from slimkit.graph.frames import Frame
    from slimkit.quantize.scheme import QuantPlan
    from slimkit.quantize.specs import CallRule

__all__ = ["Attachment", "Recomputation", "Rounding"]

Rounding: TypeAlias = Callable[[Tensor], Tensor]
"""Takes a tensor, gives the rounded one."""


class Attachment(AddressMode):
    """Rounds what the plan says at each call.

    Args:
        model: the network.
        plan: made for it.
        quantizers: name → what rounds.
        integer: call address → the arithmetic of an integer kernel, to be used there.
        called: gets the addresses of the calls that ran; ``None`` to not note them.
        owner: of the quantizers, if gradients will be taken: it hears of runs inside of
            activation checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: QuantPlan,
        quantizers: Mapping[str, Rounding],
        *,
        integer: Mapping[str, IntegerCall] | None = None,
        called: set[str] | None = None,
        owner: Recomputable | None = None,
    ) -> None:
        planned = plan.calls.keys() | integer.keys() if integer else plan.calls.keys()
        super().__init__(model, plan.table, planned)
        self._rules = plan.calls
        self._round = quantizers
        self._integer = integer or {}
        self._called = called
        self._owner = owner
        self._outside = None if owner is None else region()

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """The call on rounded arguments, its result rounded."""
        if self._called is not None:
            self._called.add(address)
        rule = self._rules.get(address)
        integer = self._integer.get(address)
        if rule is None and integer is None:
            return func(*args, **kwargs)
        self._check_recomputable(address)
        inputs, outputs = (rule.inputs, rule.outputs) if rule is not None else ({}, {})
        if rule is not None and rule.gate is not None:
            return self._rounded(self._gated(address, func, (args, kwargs), rule), outputs)
        result = None
        if integer is not None:
            data = {position: name for position, name in inputs.items() if self._is_data(name)}
            result = integer(func, *self._rounded((args, kwargs), data))
            if result is not None and _is_inplace(func):
                result = args[0].copy_(result)
        if result is None:
            args, kwargs = self._rounded((args, kwargs), inputs)
            result = func(*args, **kwargs)
        return self._rounded(result, outputs)

    def on_module(self, frame: Frame, args: tuple[Any, ...]) -> None:
        """Note a run whose activations are not kept."""
        if self._owner is None:
            return
        frame.region = region()
        if frame.path and frame.region != self._outside and inside_checkpoint():
            note_run(self._owner, frame.path, frame.label, args)

    def _check_recomputable(self, address: str) -> None:
        if self._owner is None or self._frame.region == region() or not inside_checkpoint():
            return
        raise AddressError(
            "it runs inside of torch.utils.checkpoint, but the module that makes it was entered "
            "outside: backward would compute it again without rounding",
            where=address,
            hint="checkpoint a module, not a method or a function",
        )

    def _gated(
        self, address: str, func: Callable[..., Any], arguments: Any, rule: CallRule
    ) -> Tensor:
        """``x · g(x)`` with both factors rounded."""
        args, kwargs = self._rounded(arguments, rule.inputs)
        in_place = _is_inplace(func) or kwargs.get("inplace") is True or True in args[1:2]
        integer = self._integer.get(address)
        result = None if integer is None else integer(func, args, kwargs)
        if result is None:
            curve = GATES[function_of(address)]
            x = args[0].clone() if in_place else args[0]  # gradients need it as it was
            result = x * self._round[str(rule.gate)](curve(x))
        return args[0].copy_(result) if in_place else result

    def _is_data(self, name: str) -> bool:
        return isinstance(self._round[name], ActivationQuantizer | DynamicQuantizer)

    def _rounded(self, values: Any, names: Mapping[int, str]) -> Any:
        if not names:
            return values
        if isinstance(values, Tensor):
            return self._round[names[0]](values) if 0 in names else values
        position = -1

        def walk(value: Any) -> Any:
            nonlocal position
            if isinstance(value, Tensor):
                position += 1
                name = names.get(position)
                return value if name is None else self._round[name](value)
            if isinstance(value, tuple | list):
                items = [walk(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            if isinstance(value, Mapping):
                return {key: walk(item) for key, item in value.items()}
            return value

        return walk(values)


class Recomputation(Attachment):
    """A part of a training forward once more, in backward: ranges are not observed again.

    Args:
        model: the network.
        plan: made for it.
        quantizers: all of the network.
    """

    def __init__(
        self, model: nn.Module, plan: QuantPlan, quantizers: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(model, plan, quantizers)
        self._activations = [q for q in quantizers.values() if isinstance(q, ActivationQuantizer)]
        self._observing: list[ActivationQuantizer] = []

    def __enter__(self) -> AddressMode:
        self._observing = [q for q in self._activations if q.observing]
        for quantizer in self._observing:
            quantizer.observing = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for quantizer in self._observing:
            quantizer.observing = True
        super().__exit__(*error)


def _is_inplace(func: Callable[..., Any]) -> bool:
    """Whether ``func`` changes its first argument: ``add_``, ``+=``."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
