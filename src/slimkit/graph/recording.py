"""The modes under which a forward is captured: they number tensors and fill a graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimkit.errors import CaptureError, SlimkitError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.captured import Call, Graph, Op, Ref, TensorInfo, tensors_in
from slimkit.graph.isolation import KeptParameters, tracked_attributes
from slimkit.graph.shortcuts import ValuesNeededError, decides, reads_values, without_values
from slimkit.graph.sight import Sight
from slimkit.graph.sizes import TrackedInt
from slimkit.inputs import Inputs

__all__ = ["GraphRecorder", "ValueNumbering"]


class ValueNumbering:
    """Recognises an operator that an earlier forward ran in the same place on the same values.

    Hash-consing, as compilers do it to find common subexpressions: the k-th operator with a key
    gets the results of the k-th with that key before.
    """

    def __init__(self) -> None:
        self.again = False
        self._results: dict[Any, list[tuple[int, ...]]] = {}
        self._turns: dict[Any, int] = {}

    def begin_again(self) -> None:
        """A second forward begins."""
        self.again = True
        self._turns = {}

    def known(self, key: Any) -> tuple[int, ...] | None:
        """The results of the operator with this key, if it ran before."""
        turn = self._turns.get(key, 0)
        self._turns[key] = turn + 1
        results = self._results.get(key, ())
        return results[turn] if turn < len(results) else None

    def note(self, key: Any, results: tuple[int, ...]) -> None:
        """What an operator that was not known returned."""
        self._results.setdefault(key, []).append(results)


class GraphRecorder:
    """Numbers tensors by identity and fills a graph.

    Args:
        model: whose parameters and buffers have names.
        values: whether every operator is computed.
    """

    def __init__(self, model: nn.Module, values: bool) -> None:
        self.graph = Graph()
        self.computes = values
        self.numbering: ValueNumbering | None = None
        self.sight: Sight | None = None
        self.kept: KeptParameters | None = None
        self._ids: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._storages: dict[tuple[Any, ...], int] = {}
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self.graph.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        first: dict[int, str] = {}
        for name, tensor in named:
            value = self.value(tensor, name)
            self.graph.parameters[name] = value
            if value in first:
                self.graph.aliases.setdefault(first[value], [first[value]]).append(name)
            first.setdefault(value, name)
            self._storages.setdefault(_storage_key(tensor), value)

    def record(self, model: nn.Module, inputs: Inputs) -> None:
        """Run ``model`` and fill the graph."""
        for tensor, number in zip(inputs.tensors(), self.graph.inputs, strict=False):
            self.bind(tensor, number)  # the second forward is called with the same
        self.graph.inputs = tuple(self.value(tensor) for tensor in inputs.tensors())
        calls = _CallRecorder(model, self)
        try:
            with tracked_attributes(model, self.graph), calls, _OpRecorder(self, calls):
                result = inputs.call(model)
        except (SlimkitError, ValuesNeededError):
            raise
        except Exception as error:
            path = calls.failed or calls.module_path
            mode = "evaluation" if self.kept is None else "training"
            raise CaptureError(
                f"the forward failed with {type(error).__name__}: {error}",
                where=path or type(model).__name__,
                hint=f"check that model(*example_inputs) runs in {mode} mode",
            ) from error
        outputs = tuple(self.value(tensor) for tensor in tensors_in(result))
        if self.kept is None:
            recorded = {call.address for call in self.graph.calls}
            self.graph.table = calls.recorded.restricted(recorded)
        self.graph.outputs = tuple(dict.fromkeys((*self.graph.outputs, *outputs)))

    def value(self, tensor: Tensor, name: str | None = None) -> int:
        """The number of ``tensor``; a tensor never seen before is a constant."""
        number = self._known(tensor) if name is None else self._same(tensor)
        if number is not None:
            return number
        if self.numbering is None or name is not None:
            return self.fresh(tensor, name)
        key = ("constant", tuple(tensor.shape), tensor.dtype)
        found = self.numbering.known(key)
        if found is not None:
            self.bind(tensor, found[0])
            return found[0]
        number = self.fresh(tensor)
        self.numbering.note(key, (number,))
        return number

    def result(self, tensor: Tensor) -> int:
        """The number of what an operator returned."""
        number = self._known(tensor)
        return self.fresh(tensor) if number is None else number

    def bind(self, tensor: Tensor, number: int) -> None:
        """``tensor`` is the value ``number``."""
        self._ids[id(tensor)] = (weakref.ref(tensor), number)

    def _same(self, tensor: Tensor) -> int | None:
        held = self._ids.get(id(tensor))
        return held[1] if held is not None and held[0]() is tensor else None

    def _known(self, tensor: Tensor) -> int | None:
        number = self._same(tensor)
        if number is None and self._storages:  # ``parameter.data`` is another tensor object
            number = self._storages.get(_storage_key(tensor))
        return number

    def fresh(self, tensor: Tensor, name: str | None = None) -> int:
        """A new number for ``tensor``, also if it had one."""
        number = len(self.graph.tensors)
        self.bind(tensor, number)
        info = TensorInfo(number, tuple(tensor.shape), tensor.dtype, name)
        self.graph.tensors[number] = info
        return number

    def values(self, arguments: Any) -> tuple[int, ...]:
        """The numbers of all tensors in nested arguments, in order."""
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

    def __init__(self, model: nn.Module, recorder: GraphRecorder) -> None:
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
        if reads_values(func):
            if not self._recorder.computes:
                raise ValuesNeededError
            graph.read += [(self.module_path, v) for v in self._recorder.values((args, kwargs))]
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
        sight, numbering = self._recorder.sight, self._recorder.numbering
        if sight is not None:
            sight.see(self.module_path, (*inputs, *outputs))
        if issued or (outputs and not (numbering and numbering.again)):
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

    def __init__(self, recorder: GraphRecorder, calls: _CallRecorder) -> None:
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
        changed = func._schema.is_mutable
        if changed and recorder.kept is not None:
            recorder.kept.before_write(tensors_in((args, kwargs)))
        result = self._computed(func, args, kwargs)
        numbering, module, key = recorder.numbering, self._calls.module_path, None
        if numbering is not None:
            key = (func, module, inputs, repr((recorded_args, recorded_kwargs)))
            known = numbering.known(key)
            results = list(tensors_in(result))
            if known is not None and len(known) == len(results):
                for tensor, number in zip(results, known, strict=True):
                    recorder.bind(tensor, number)
                return result
        outputs = tuple(
            recorder.fresh(tensor) if changed else recorder.result(tensor)
            for tensor in tensors_in(result)
        )
        if numbering is not None:
            numbering.note(key, outputs)
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
                module=module,
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
