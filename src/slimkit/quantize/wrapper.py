"""The quantized model: a network, its quantizers, and a forward that joins them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as _cp
from torch import Tensor, nn

from slimkit.errors import SlimkitError
from slimkit.graph.addressing import (
    RECOMPUTERS,
    AddressMode,
    _tensors,
    function_of,
    hold_hooks,
    paths_of,
)
from slimkit.plan import applied_plans
from slimkit.quantize.integer.activations import GATES
from slimkit.quantize.integer.calls import IntegerCall, integer_call
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer, WeightQuantizer
from slimkit.quantize.quantizers.host_values import HostValue
from slimkit.quantize.quantizers.learned import build_quantizer
from slimkit.quantize.scheme import CallRule, QuantPlan, named_weights
from slimkit.runtime.export_hooks import BIASES, OPSET, SCALES

__all__ = ["QuantizedModel", "Rounding"]


class AddressError(SlimkitError, RuntimeError):
    """The forward makes other calls than the captured one."""


Rounding = Callable[[Tensor], Tensor]
"""Takes a tensor, gives the rounded one."""


class QuantizedModel(nn.Module):
    """``model`` with tensors rounded as ``plan`` says; call it as you call ``model``.

    It trains in any loop: parameters are those of the network, gradients pass the rounding
    straight through. ``state_dict`` holds weights and scales. A network that changes a tensor in
    place must go on with what the function returned (``x = relu_(x)``): that is what is rounded.

    Args:
        model: the network with batch norms folded; not copied.
        plan: made for it.

    Attributes:
        model: the network.
        quantizers: name → quantizer.
        plan: the plan.
    """

    observer_steps_left: Tensor

    def __init__(self, model: nn.Module, plan: QuantPlan) -> None:
        super().__init__()
        self.model = model
        self.plan = plan
        self.quantizers = nn.ModuleDict()
        for spec in plan.quantizers:
            self.quantizers[spec.name] = build_quantizer(spec)
        self.register_buffer("observer_steps_left", torch.tensor(0, dtype=torch.int64))
        self._steps_left = HostValue(_whole, value=0)
        self._called: set[str] | None = None
        parameter = next(model.parameters(), None)
        if parameter is not None:
            self.quantizers.to(parameter.device)
            self.observer_steps_left = self.observer_steps_left.to(parameter.device)
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's result on rounded weights and activations.

        In evaluation mode and without gradients it is computed with the arithmetic of integer
        kernels (:mod:`slimkit.quantize.integer.arithmetic`).
        """
        if self.training and not torch.compiler.is_exporting():
            self._count_step()
        exact = not (self.training or torch.is_grad_enabled() or torch.compiler.is_exporting())
        if exact:  # a kernel needs the scale of its output before that is rounded
            for quantizer in self.activation_quantizers().values():
                quantizer.refresh()
        mode = _Attachment(self, self._called, exact=exact)
        with mode:
            result = self.model(*args, **kwargs)
        mode.check()
        return result

    def recomputation(self, module: nn.Module, args: Any) -> AddressMode | None:
        """For a module that runs in backward, because its activations were not kept."""
        found = paths_of(self.model).get(id(module.__dict__))
        runs = self.__dict__.get("_runs", {}).get(found[1]) if found else None
        if not runs:
            return None
        first = next(_tensors(args), None)
        label = runs.get(_place(first))
        if label is None:
            if len(set(runs.values())) > 1:
                raise AddressError(
                    f"{len(runs)} runs, and it is not known which of them is computed again",
                    where=found[1],
                )
            label = next(iter(runs.values()))
        return _Recomputation(self, label)

    def attachment(
        self,
        replaced: Mapping[str, Rounding] | None = None,
        followed: Sequence[tuple[str, nn.Module]] | None = None,
    ) -> AddressMode:
        """A mode in which :attr:`model`, or one module of it alone, computes as in :meth:`forward`.

        Args:
            replaced: name of a quantizer → what to use in its place.
            followed: see :class:`~slimkit.graph.addressing.AddressMode`.
        """
        exact = not (replaced or self.training or torch.is_grad_enabled())
        return _Attachment(self, None, exact=exact, replaced=replaced, followed=followed)

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """Name → quantizer of an activation whose scale is stored."""
        quantizers = self.quantizers.items()
        return {name: q for name, q in quantizers if isinstance(q, ActivationQuantizer)}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: LSQ's step sizes and offsets."""
        names = (name for name, _ in self.quantizers.named_parameters())
        return {f"quantizers.{n}" for n in names if n.endswith((".step_size", ".offset"))}

    def bit_widths(self) -> Mapping[str, tuple[int, int]]:
        """Module path in this wrapper → (weight bits, activation bits) of integer layers."""
        return {f"model.{path}": bits for path, bits in self.plan.bit_widths().items()}

    def export_hints(self) -> dict[str, str]:
        """What the export has to know of the target (:mod:`slimkit.runtime.qdq`)."""
        compact = any(spec.compact for spec in self.plan.quantizers)
        scales = {SCALES: "bytes"} if compact else {}
        return {BIASES: self.plan.biases, OPSET: str(self.plan.opset), **scales}

    def observe_for(self, steps: int) -> None:
        """Let activation ranges follow the next ``steps`` training forwards, then freeze."""
        self.observer_steps_left.fill_(steps)

    def freeze_observers(self) -> None:
        """Keep the activation ranges as they are from now on."""
        self.observe_for(0)

    def set_rounding(self, enabled: bool) -> None:
        """Turn all rounding on, or off for the plain float network."""
        for quantizer in self.quantizers.values():
            if isinstance(quantizer, ActivationQuantizer | DynamicQuantizer | WeightQuantizer):
                quantizer.rounding = enabled

    def refresh_weights(self) -> None:
        """Bring the scales of all weights up to date, as a forward does."""
        weights = named_weights(self.model)
        for spec in self.plan.quantizers:
            quantizer = self.quantizers[spec.name]
            if spec.parameter is not None and isinstance(quantizer, WeightQuantizer):
                quantizer.refresh(weights[spec.parameter])

    @contextmanager
    def recording_calls(self, called: set[str]) -> Iterator[None]:
        """Inside, the addresses of the calls that run are added to ``called``."""
        self._called = called
        try:
            yield
        finally:
            self._called = None

    @contextmanager
    def using(self, plan: QuantPlan) -> Iterator[None]:
        """Inside, it computes as ``plan`` says, which uses a part of the quantizers."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def replace_plan(self, plan: QuantPlan) -> None:
        """Go on with ``plan``, which uses a part of the quantizers; the others are removed."""
        self.slimkit_plans = [plan if p is self.plan else p for p in applied_plans(self)]
        self.plan = plan
        for name in set(self.quantizers) - {spec.name for spec in plan.quantizers}:
            del self.quantizers[name]

    def integer_calls(self) -> dict[str, IntegerCall]:
        """Call address → the integer kernel's arithmetic, for the calls that have one."""
        found: dict[str, IntegerCall] = {}
        for decision in self.plan.decisions:
            if not decision.integer:
                continue
            rule = self.plan.calls.get(decision.address)
            kernel = integer_call(decision, self.quantizers, None if rule is None else rule.gate)
            if kernel is not None:
                found[decision.address] = kernel
        return found

    def _count_step(self) -> None:
        left = self._steps_left.of(self.observer_steps_left)
        observing = left > 0
        for quantizer in self.activation_quantizers().values():
            quantizer.observing = observing
        if observing:
            self.observer_steps_left.sub_(1)
            self._steps_left.know(self.observer_steps_left, left - 1)

    def train(self, mode: bool = True) -> QuantizedModel:
        """Training mode; ranges are not observed in evaluation mode."""
        super().train(mode)
        if not mode:
            for quantizer in self.activation_quantizers().values():
                quantizer.observing = False
        return self


def _whole(number: Tensor) -> int:
    return int(number.item())


def _is_inplace(func: Callable[..., Any]) -> bool:
    """Whether ``func`` changes its first argument: ``add_``, ``+=``."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


class _Attachment(AddressMode):
    """Rounds what the plan says at each call.

    Args:
        quantized: the network with quantizers and plan.
        called: gets the addresses of the calls that ran; ``None`` to not note them.
        exact: compute like integer kernels.
        replaced: name of a quantizer → what to use in its place.
        followed: as for the base class.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        called: set[str] | None,
        *,
        exact: bool,
        replaced: Mapping[str, Rounding] | None = None,
        followed: Sequence[tuple[str, nn.Module]] | None = None,
    ) -> None:
        super().__init__(quantized.model, followed, quantized.plan.table)
        self._called = called
        self._quantized = quantized
        self._partial = followed is not None
        self._noting = (
            quantized.training and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        )
        self._region = _region() if self._noting else None
        self._rules = quantized.plan.calls
        self._quantizers: dict[str, Rounding] = {**quantized.quantizers, **(replaced or {})}
        self._integer = quantized.integer_calls() if exact else {}
        self._round: dict[str, Rounding] = dict(self._quantizers)

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if self._called is not None:
            self._called.add(address)
        rule = self._rules.get(address)
        integer = self._integer.get(address)
        if rule is None and integer is None:
            return func(*args, **kwargs)
        if self._noting and _region() != self._frame.region and _in_checkpoint():
            raise AddressError(
                "it runs inside of torch.utils.checkpoint, but no module of its own does: "
                "checkpoint a module",
                where=address,
            )
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

    def on_extra(self, address: str, why: str) -> None:
        if address in self._rules:
            raise AddressError(
                f"the forward makes other calls than the captured one: {why}", where=address
            )

    def check(self) -> None:  # noqa: C901
        """Every planned call ran once, or did not run and nothing else ran in its place."""
        table = self._table
        if table is None:
            return
        left = self._rules.keys() - self._met
        wanting = {(table.calls[a][0], function_of(a)) for a in left}
        suspects = [
            (run, a)
            for run, a in self._tainted
            if a in self._rules or (run, function_of(a)) in wanting
        ]
        if suspects and self._unknown:
            unknown_ = {(run, function) for run, function, _ in self._unknown}
            unmet = {
                (table.calls[a][0], function_of(a))
                for a in table.calls.keys() - self._met
                if table.calls[a][2]
            }
            runs = {run for run, _ in unknown_ & unmet}
            for run, address in suspects:
                if run in runs:
                    raise AddressError("other calls than captured ran before it", where=address)
        if self._extra_runs:
            for path in self._extra_runs:
                prefix = path + "."
                for address in self._rules:
                    if address.startswith((path + ":", prefix)):
                        raise AddressError(
                            "its module runs more often than captured", where=address
                        )
        if not left:
            return
        unknown = {(run, function): ops for run, function, ops in self._unknown}
        for address in left:
            run, operands, *_ = table.calls[address]
            function = function_of(address)
            alike = table.by_key[run, function, operands]
            if any(other in self._met for other, _ in alike):
                raise AddressError("only some of several equal calls ran", where=address)
            if (run, function) in unknown:
                raise AddressError(
                    f"captured on {operands}, but this forward calls {function} on "
                    f"{unknown[run, function]}",
                    where=address,
                )

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        super()._enter_module(module, args)
        if self._noting:
            self._frame.region = _region()

    def _label(self, caller: str, path: str, operands: tuple[str, ...], args: Any) -> str:
        label = super()._label(caller, path, operands, args)
        if self._noting and _region() != self._region and _in_checkpoint():
            owner = self._quantized
            if owner not in RECOMPUTERS:
                RECOMPUTERS.add(owner)
                hold_hooks(+1)
                weakref.finalize(owner, hold_hooks, -1)
            runs = owner.__dict__.setdefault("_runs", {}).setdefault(path, {})
            if len(runs) > 64:
                del runs[next(iter(runs))]
            runs[_place(next(_tensors(args), None))] = label
        return label

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
        return isinstance(self._quantizers[name], ActivationQuantizer | DynamicQuantizer)

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


def _region() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), None if hooks is None else id(hooks[0])


def _in_checkpoint() -> bool:
    """Whether the innermost change of the gradient mode or of the saved tensors is a checkpoint."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in _CHECKPOINTS:
            return True
        frame = frame.f_back
    return False


_CHECKPOINTS = {_cp.CheckpointFunction.forward.__code__, _cp._checkpoint_impl.__code__}


def _place(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    with torch._C.DisableTorchFunction():  # hooks run under the mode
        return tensor.data_ptr(), tuple(tensor.shape)


class _Recomputation(_Attachment):
    """A part of a training forward once more, in backward: ranges are not observed again."""

    def __init__(self, quantized: QuantizedModel, label: str) -> None:
        super().__init__(quantized, None, exact=False)
        self._noting = False
        self._first: str | None = label
        self._observing: list[Any] = []

    def _label(self, caller: str, path: str, operands: tuple[str, ...], args: Any) -> str:
        if self._first is not None:
            label, self._first = self._first, None
            return label
        return super()._label(caller, path, operands, args)

    def __enter__(self) -> AddressMode:
        found = self._quantized.activation_quantizers().values()
        self._observing = [q for q in found if q.observing]
        for quantizer in self._observing:
            quantizer.observing = False
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for quantizer in self._observing:
            quantizer.observing = True
