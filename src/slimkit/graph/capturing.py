"""Capture: run a model once and keep what it did.

One eager forward in evaluation mode, without gradients, under two modes: a
:class:`~slimkit.graph.addressing.AddressMode` that sees the Python-level calls
(``F.conv2d``, ``x + y``) and a dispatch mode that sees the operators below
(``aten.convolution``). Whatever the Python control flow does, the two lists hold what
happened, in order, connected by value numbers. No tensor data is kept, so convolutions and
matrix products, which take most of the time, hand out zeros (:mod:`slimkit.graph.shortcuts`);
where something that happens depends on values, the forward begins again and computes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimkit.errors import CaptureError, SlimkitError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.isolation import own_inputs, tracked_attributes, uncollected, undisturbed
from slimkit.graph.shortcuts import ValuesNeededError, decides, reads_values, without_values
from slimkit.graph.sizes import Powers, TrackedInt
from slimkit.inputs import ExampleInputs

__all__ = [
    "Call",
    "Graph",
    "Op",
    "Ref",
    "TensorInfo",
    "capture",
    "tensors_in",
]


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the recorded arguments of an operator.

    Attributes:
        id: the value number; see :attr:`Graph.tensors`.
    """

    id: int


@dataclass(frozen=True)
class TensorInfo:
    """What is known of one value.

    Attributes:
        id: the value number.
        shape: for images ``(N, C, H, W)``.
        dtype: element type.
        name: the parameter's or buffer's name (the first of tied names), else ``None``.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None


@dataclass(frozen=True)
class Op:
    """One operator that was executed.

    Attributes:
        index: position in :attr:`Graph.ops`, which is the order of execution.
        target: the operator.
        name: such as ``"aten.convolution.default"``.
        args, kwargs: the arguments, tensors replaced by :class:`Ref`.
        inputs: value numbers of the tensors in the arguments, in order.
        outputs: value numbers of the results. What an in-place operator changed counts as
            a new value.
        module: path of the innermost module that was running.
        call: index in :attr:`Graph.calls` of the call that issued it, −1 if none did.
    """

    index: int
    target: torch._ops.OpOverload
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    call: int


@dataclass(frozen=True)
class Call:
    """One Python-level call of a torch function that returned tensors or ran operators.

    Attributes:
        index: position in :attr:`Graph.calls`.
        module: path of the innermost module that was running.
        function: normalised name (:func:`~slimkit.graph.addressing.function_name`).
        ordinal: how many calls of ``function`` this module had made before.
        inputs: value numbers of the tensors in the arguments, in order.
        outputs: value numbers of the tensors in the result. A function that hands its
            argument back (dropout in evaluation) has it in both.
        args, kwargs: the arguments, tensors replaced by :class:`Ref`; a size that the model
            read from a tensor or a module is a :class:`~slimkit.graph.sizes.TrackedInt`.
    """

    index: int
    module: str
    function: str
    ordinal: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """``"module:function#ordinal"``, the same in every forward of the model."""
        return f"{self.module}:{self.function}#{self.ordinal}"


class Graph:
    """Everything one forward did.

    Attributes:
        ops: operators in order of execution.
        calls: Python-level calls in order of completion.
        tensors: value number → :class:`TensorInfo`.
        inputs: value numbers of the example tensors.
        outputs: value numbers of the tensors in the model's result.
        parameters: name of a parameter or buffer → value number; tied names share it.
        aliases: first name → all names, for tied parameters only.
        attributes: (module path, name, value) of the modules' whole-number attributes; their
            origin in a tracked size is :func:`~slimkit.graph.sizes.attribute_origin`.
        fixed: products of sizes that the model relies on in arithmetic or comparisons.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.tensors: dict[int, TensorInfo] = {}
        self.inputs: tuple[int, ...] = ()
        self.outputs: tuple[int, ...] = ()
        self.parameters: dict[str, int] = {}
        self.aliases: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, int]] = []
        self.fixed: list[Powers] = []
        self.table: Any = None
        self._producer: dict[int, Op] = {}
        self._consumers: dict[int, list[Op]] = {}
        self._call_producer: dict[int, Call] = {}
        self._call_consumers: dict[int, list[Call]] = {}

    def producer(self, value: int) -> Op | None:
        """The operator that made ``value``; ``None`` for inputs, parameters, constants."""
        return self._producer.get(value)

    def consumers(self, value: int) -> list[Op]:
        """The operators that read ``value``."""
        return self._consumers.get(value, [])

    def call_producer(self, value: int) -> Call | None:
        """The call that made ``value`` (not one that only handed it on)."""
        return self._call_producer.get(value)

    def call_consumers(self, value: int) -> list[Call]:
        """The calls that read ``value`` and do not merely hand it on."""
        return self._call_consumers.get(value, [])

    def __repr__(self) -> str:
        return (
            f"Graph({len(self.ops)} operators, {len(self.calls)} calls, "
            f"{len(self.parameters)} parameters and buffers)"
        )

    def _add_op(self, op: Op) -> None:
        self.ops.append(op)
        for value in op.outputs:
            if value not in op.inputs:
                self._producer.setdefault(value, op)
        for value in dict.fromkeys(op.inputs):
            self._consumers.setdefault(value, []).append(op)

    def _add_call(self, call: Call) -> None:
        self.calls.append(call)
        for value in call.outputs:
            if value not in call.inputs:
                self._call_producer.setdefault(value, call)
        for value in dict.fromkeys(call.inputs):
            if value not in call.outputs:
                self._call_consumers.setdefault(value, []).append(call)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, dataclasses and result objects, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list | set):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from tensors_in(getattr(value, item.name, None))


@uncollected()
def capture(model: nn.Module, example_inputs: ExampleInputs) -> Graph:
    """Run ``model`` once and record its operators, calls and tensors.

    The forward runs in evaluation mode and without gradients, on the device of the first
    parameter. Training flags, buffers and the random state are afterwards as before. Hooks of
    the model see zeros behind convolutions and linear layers.

    Args:
        model: any module.
        example_inputs: what it is called with; see :class:`~slimkit.inputs.Inputs`.

    Raises:
        CaptureError: the forward failed; names the innermost module that was running.
        InputError: ``example_inputs`` is of no accepted kind.
    """
    try:
        return _captured(model, example_inputs, values=False)
    except (ValuesNeededError, CaptureError):  # zeros may be what it failed on
        return _captured(model, example_inputs, values=True)


def _captured(model: nn.Module, example_inputs: ExampleInputs, *, values: bool) -> Graph:
    inputs = own_inputs(model, example_inputs)
    recorder = _Recorder(model, values)
    with undisturbed(model), torch.no_grad():
        recorder.graph.inputs = tuple(recorder.value(tensor) for tensor in inputs.tensors())
        calls = _CallRecorder(model, recorder)
        try:
            with tracked_attributes(model, recorder.graph), calls, _OpRecorder(recorder, calls):
                result = inputs.call(model)
        except (SlimkitError, ValuesNeededError):
            raise
        except Exception as error:
            path = calls.failed or calls.module_path
            raise CaptureError(
                f"the forward failed with {type(error).__name__}: {error}",
                where=path or type(model).__name__,
                hint="check that model(*example_inputs) runs in evaluation mode",
            ) from error
        recorder.graph.table = calls.recorded
        recorder.graph.outputs = tuple(recorder.value(tensor) for tensor in tensors_in(result))
    return recorder.graph


class _Recorder:
    """Numbers tensors by identity and fills a graph.

    Args:
        model: whose parameters and buffers have names.
        values: whether every operator is computed.
    """

    def __init__(self, model: nn.Module, values: bool) -> None:
        self.graph = Graph()
        self.computes = values
        self._ids: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._storages: dict[tuple[Any, ...], int] = {}
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        first: dict[int, str] = {}
        for name, tensor in named:
            value = self.value(tensor, name)
            self.graph.parameters[name] = value
            if value in first:
                self.graph.aliases.setdefault(first[value], [first[value]]).append(name)
            first.setdefault(value, name)
            self._storages.setdefault(_storage_key(tensor), value)

    def value(self, tensor: Tensor, name: str | None = None) -> int:
        """The number of ``tensor``; a tensor never seen before is a constant."""
        held = self._ids.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1]
        if name is None and self._storages:  # ``parameter.data`` is another tensor object
            known = self._storages.get(_storage_key(tensor))
            if known is not None:
                return known
        return self.fresh(tensor, name)

    def fresh(self, tensor: Tensor, name: str | None = None) -> int:
        """A new number for ``tensor``, also if it had one."""
        number = len(self.graph.tensors)
        self._ids[id(tensor)] = (weakref.ref(tensor), number)
        info = TensorInfo(number, tuple(tensor.shape), tensor.dtype, name)
        self.graph.tensors[number] = info
        return number

    def values(self, arguments: Any) -> tuple[int, ...]:
        return tuple(self.value(tensor) for tensor in tensors_in(arguments))

    def refs(self, argument: Any) -> Any:
        """``argument`` with tensors replaced by :class:`Ref`."""
        if isinstance(argument, Tensor):
            return Ref(self.value(argument))
        if isinstance(argument, tuple | list):
            items = [self.refs(item) for item in argument]
            return items if isinstance(argument, list) else tuple(items)
        if isinstance(argument, dict):
            return {key: self.refs(item) for key, item in argument.items()}
        return argument

    def tracked(
        self, tensor: Tensor, sizes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The result of ``tensor.shape`` or ``tensor.size()`` with its origin attached."""
        value = self.value(tensor)
        fixed = self.graph.fixed
        if isinstance(sizes, int):
            dim = kwargs.get("dim", args[0] if args else 0)
            return TrackedInt(sizes, (((value, dim % tensor.ndim), 1),), fixed)
        return torch.Size(
            TrackedInt(size, (((value, dim), 1),), fixed) for dim, size in enumerate(sizes)
        )

    def elements(self, tensor: Tensor) -> Any:
        """The result of ``tensor.numel()`` with its origins attached."""
        value = self.value(tensor)
        powers = tuple(((value, dim), 1) for dim in range(tensor.ndim))
        return TrackedInt(tensor.numel(), powers, self.graph.fixed)


_SHAPE: Any = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_NUMEL = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)


def _storage_key(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class _CallRecorder(AddressMode):
    """Records the Python-level calls."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        super().__init__(model)
        self._recorder = recorder
        self.current = -1

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        graph = self._recorder.graph
        if func == _SHAPE or func is torch.Tensor.size:
            return self._recorder.tracked(args[0], func(*args, **kwargs), args[1:], kwargs)
        if func in _NUMEL:
            return self._recorder.elements(args[0])
        if not self._recorder.computes and reads_values(func):
            raise ValuesNeededError
        recorded = self._recorder.refs(args), self._recorder.refs(dict(kwargs))
        inputs = self._recorder.values((args, kwargs))
        first_op = len(graph.ops)
        self.current = len(graph.calls)
        try:
            result = func(*args, **kwargs)
        finally:
            self.current = -1
        outputs = self._recorder.values(result)
        issued = len(graph.ops) > first_op
        if not outputs and issued:  # ``x[:, :2] = y`` returns nothing
            outputs = graph.ops[-1].outputs
        if outputs or issued:
            module, _, rest = address.rpartition(":")
            function, _, ordinal = rest.rpartition("#")
            graph._add_call(
                Call(
                    index=len(graph.calls),
                    module=module,
                    function=function,
                    ordinal=int(ordinal),
                    inputs=inputs,
                    outputs=outputs,
                    args=recorded[0],
                    kwargs=recorded[1],
                )
            )
        return result


class _OpRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operators below the calls."""

    def __init__(self, recorder: _Recorder, calls: _CallRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        self._calls = calls

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        recorded_args = recorder.refs(args)
        recorded_kwargs = {key: recorder.refs(item) for key, item in kwargs.items()}
        inputs = recorder.values((args, kwargs))
        result = self._computed(func, args, kwargs)
        changed = func._schema.is_mutable
        outputs = tuple(
            recorder.fresh(tensor) if changed else recorder.value(tensor)
            for tensor in tensors_in(result)
        )
        graph = recorder.graph
        graph._add_op(
            Op(
                index=len(graph.ops),
                target=func,
                name=str(func),
                args=recorded_args,
                kwargs=recorded_kwargs,
                inputs=inputs,
                outputs=outputs,
                module=self._calls.module_path,
                call=self._calls.current,
            )
        )
        return result

    def _computed(
        self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._recorder.computes:
            return func(*args, **kwargs)
        if decides(func, args):
            raise ValuesNeededError
        return without_values(func, args, kwargs)
