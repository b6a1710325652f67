"""What a capture holds: operators, Python-level calls and values, connected by value numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from slimkit.graph.call_table import CallTable
from slimkit.graph.sizes import Powers

__all__ = ["Call", "Graph", "Op", "Ref", "TensorInfo", "tensors_in"]


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
        function: normalised name (:func:`~slimkit.graph.functions.function_name`).
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
        """``"module:function#ordinal"``: its name, also in other forwards of the model."""
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
        buffers: which of those names are buffers.
        aliases: first name → all names, for tied parameters only.
        attributes: (module path, name, value) of the modules' whole-number attributes; their
            origin in a tracked size is :func:`~slimkit.graph.sizes.attribute_origin`.
        fixed: products of sizes that the model relies on in arithmetic or comparisons.
        read: (module path, value number) of tensors whose numbers Python read without an
            operator (``x.tolist()``); reads by an operator (``bool(x)``) are among the ``ops``.
        table: by which the calls of other forwards are recognised as those of the evaluation
            forward.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.tensors: dict[int, TensorInfo] = {}
        self.inputs: tuple[int, ...] = ()
        self.outputs: tuple[int, ...] = ()
        self.parameters: dict[str, int] = {}
        self.buffers: set[str] = set()
        self.aliases: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, int]] = []
        self.fixed: list[Powers] = []
        self.read: list[tuple[str, int]] = []
        self.table = CallTable()
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

    def copy(self) -> Graph:
        """A graph that can grow without this one."""
        twin = Graph()
        for name, held in vars(self).items():
            if isinstance(held, dict):
                lists = {k: list(v) if isinstance(v, list) else v for k, v in held.items()}
                setattr(twin, name, lists)
            else:
                setattr(twin, name, list(held) if isinstance(held, list) else held)
        return twin

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
