"""Addresses of tensor functions: the same name for the same call in every forward of a model.

An address is ``"layer1.0:conv2d#0"``: the path of the innermost running module, the
normalised name of the torch function, and how many calls of that function the module made
before in this forward. Capture, which runs once in evaluation mode, and the quantizer,
which acts during every training step, get equal addresses because both derive from
:class:`AddressMode`.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["AddressMode", "CallTable", "function_name", "function_of"]

_COMPOSITE: frozenset[Any] = frozenset({F.multi_head_attention_forward})
"""Python functions made of several layers: their inside is addressed, not the whole."""


@functools.lru_cache(maxsize=4096)
def function_name(func: Callable[..., Any]) -> str:
    """The normalised name of a torch function: one name for all spellings of an operation.

    ``F.relu``, ``torch.relu_`` and ``Tensor.relu_`` are ``"relu"``; ``x + y``, ``x += y``
    and ``torch.add`` are ``"add"``; ``torch.ops.aten.relu.default`` is ``"relu"``;
    attribute reads have the attribute's name (``x.T`` is ``"T"``).
    """
    name: str = getattr(func, "__name__", None) or type(func).__name__
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if isinstance(func, torch._ops.OpOverload):
        name = name.split(".")[0]
    inplace_dunder = name.startswith("__i") and name.endswith("__") and hasattr(torch, name[3:-2])
    return name[3:-2] if inplace_dunder else name.strip("_") or name


def function_of(address: str) -> str:
    """The function's name in an address: ``"conv2d"`` of ``"layer1.0:conv2d#0"``."""
    return address.rpartition(":")[2].partition("#")[0]


@functools.cache
def _body_of(func: Any) -> Callable[..., Any]:
    """``func`` without its own check for torch-function modes, so that it runs its body."""
    scope = {
        **func.__globals__,
        "has_torch_function": lambda *_: False,
        "has_torch_function_unary": lambda *_: False,
        "has_torch_function_variadic": lambda *_: False,
    }
    body = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body


_FACTORIES = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {"randint_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)
"""Results that take shape, type and device of their operand, but none of its values."""
_LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Only the first operand counts."""
_CONSTANT = "_"


@dataclass
class CallTable:
    """What one captured forward called, and on what.

    Attributes:
        calls: address -> (run, operands, whether the result is a new value).
        runs: label of a run of a module ("head", "head@1") -> (label of the caller, path, operands).
    """

    calls: dict[str, tuple[str, tuple[str, ...], bool, int]] = field(default_factory=dict)
    runs: dict[str, tuple[str, str, tuple[str, ...], bool, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index()

    def __deepcopy__(self, memo: Any) -> CallTable:
        return self  # never changed after the capture

    def index(self) -> CallTable:
        self.by_key: dict[tuple[Any, ...], list[tuple[str, str | None]]] = {}
        self.by_parameter: dict[tuple[str, str, str], list[tuple[str, str | None]]] = {}
        self.known_functions: set[tuple[str, str]] = set()
        self.order: dict[tuple[str, str], int] = {}
        self._entries: list[Any] = []
        self.by_latest: dict[tuple[str, str, str], list[tuple[str, str | None]]] = {}
        for address, (run, operands, new, position) in self.calls.items():
            function = function_of(address)
            tail = address.rpartition(":")[2]
            entry = (address, tail if new else None)
            self.order[run, tail] = position
            self._entries.append((run, function, operands, entry))
            self.by_key.setdefault((run, function, operands), []).append(entry)
            for operand in operands:
                if operand[0] in "./":
                    self.by_parameter.setdefault((run, function, operand), []).append(entry)
        self.by_path: dict[str, list[str]] = {}
        self.by_run: dict[tuple[Any, ...], list[str]] = {}
        for label, (caller, path, operands, _, position) in self.runs.items():
            base = caller.partition("@")[0]
            self.order[
                caller, label[len(base) + 1 :] if base and label.startswith(base + ".") else label
            ] = position
            self.by_path.setdefault(path, []).append(label)
            self.by_run.setdefault((caller, path, operands), []).append(label)
        for run, function, operands, entry in self._entries:
            if sum(o[0] not in "./_=" for o in operands) > 1:
                latest = self.latest(run, operands)
                if latest is not None:
                    self.by_latest.setdefault((run, function, latest), []).append(entry)
        del self._entries
        return self

    def latest(self, run: str, operands: tuple[str, ...]) -> str | None:
        """The operand that was made last."""
        found, at = None, -1
        for operand in operands:
            position = self.order.get((run, operand), -1)
            if position > at:
                found, at = operand, position
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": {a: [r, " ".join(o), n, k] for a, (r, o, n, k) in self.calls.items()},
            "runs": {a: [c, p, " ".join(o), n, k] for a, (c, p, o, n, k) in self.runs.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> CallTable:
        return cls(
            {a: (r, tuple(o.split()), n, k) for a, (r, o, n, k) in data["calls"].items()},
            {a: (c, p, tuple(o.split()), n, k) for a, (c, p, o, n, k) in data["runs"].items()},
        )


class _Frame:
    """One running module: what its values are called inside of it."""

    __slots__ = ("label", "module", "names", "operands", "path", "region", "taint")

    def __init__(self, path: str, label: str, module: Any) -> None:
        self.path, self.label, self.module = path, label, module
        self.names: dict[int, tuple[Any, str]] = {}
        self.operands: tuple[str, ...] = ()
        self.region: Any = None
        self.taint: set[str] = set()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


_LOCAL = threading.local()
_LOCK = threading.Lock()
_PATHS: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[nn.Module, str]]] = (
    weakref.WeakKeyDictionary()
)
_HOOKS: list[Any] = []
_USERS = 0
RECOMPUTERS: weakref.WeakSet[Any] = weakref.WeakSet()
"""Quantized models in training: a module of theirs that runs in backward is recomputed."""


def hold_hooks(change: int) -> None:
    """Global hooks exist while somebody needs them."""
    global _USERS
    with _LOCK:
        _USERS += change
        if _USERS and not _HOOKS:
            register = torch.nn.modules.module
            _HOOKS.append(register.register_module_forward_pre_hook(_entering))
            _HOOKS.append(register.register_module_forward_hook(_leaving, always_call=True))
        elif not _USERS and _HOOKS:
            for hook in _HOOKS:
                hook.remove()
            _HOOKS.clear()


def _entering(module: nn.Module, args: Any) -> None:
    modes = getattr(_LOCAL, "modes", None)
    if modes:
        for mode in modes:
            if not mode._busy:
                mode._enter_module(module, args)
    elif RECOMPUTERS and torch._C._current_graph_task_id() != -1:
        for owner in list(RECOMPUTERS):
            mode = owner.recomputation(module, args)
            if mode is not None:
                mode.__enter__()
                mode._top = module
                mode._enter_module(module, args)
                return


def _leaving(module: nn.Module, _args: Any, result: Any) -> None:
    modes = getattr(_LOCAL, "modes", None)
    if modes:
        for mode in tuple(modes):
            if mode._busy:
                continue
            if result is None and mode.failed is None and sys.exc_info()[0] is not None:
                mode.failed = mode.module_path
            mode._leave_module(module, result)
            if mode._top is module:
                mode.__exit__(None, None, None)


def paths_of(model: nn.Module, fresh: bool = False) -> dict[int, tuple[nn.Module, str]]:
    """Identity of a module's dictionary -> module, path; that of a tracing proxy is the same."""
    found = None if fresh else _PATHS.get(model)
    if found is None:
        found = {}
        scripts: list[str] = []
        for path, module in model.named_modules():
            inside = any(path.startswith(p + ".") for p in scripts)
            if isinstance(module, torch.jit.ScriptModule):
                scripts.append(path)
            if not inside:
                found[id(module.__dict__)] = (module, path)
        _PATHS[model] = found
    return found


class AddressMode(TorchFunctionMode):
    """As before; with a ``table`` calls are recognised by it, without one they are counted."""

    def __init__(
        self,
        model: nn.Module,
        followed: Sequence[tuple[str, nn.Module]] | None = None,
        table: CallTable | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self._paths = paths_of(model)
        self._table = table
        self.recorded = CallTable()
        self._top: Any = None
        self._reset()

    def _reset(self) -> None:
        self._frame = _Frame("", "", self._model)
        self._frames = [self._frame]
        self._counts: dict[Any, int] = {}
        self._met: set[str] = set()
        self._met_runs: set[str] = set()
        self._busy = False
        self.failed: str | None = None
        self._unknown: list[tuple[str, str, tuple[str, ...]]] = []
        self._extra_runs: list[str] = []
        self._tainted: list[tuple[str, str]] = []
        self._parameters: dict[int, tuple[Any, str]] | None = None
        self._missed = False

    @property
    def module_path(self) -> str:
        """The path of the innermost module that is running (``""`` is the model itself)."""
        return self._frame.path

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        return func(*args, **kwargs)

    def on_extra(self, address: str, why: str) -> None:
        """A call that is like ``address``, which ran already."""

    # --- names ---------------------------------------------------------------------------

    def _name(self, tensor: Tensor) -> str:
        frame = self._frame
        held = frame.names.get(id(tensor))
        if held is not None and held[0]() is tensor:
            return held[1]
        module = frame.module
        for name, own in module._parameters.items():
            if own is tensor:
                return "." + name
        for name, own in module._buffers.items():
            if own is tensor:
                return "." + name
        if "_former_parameters" in module.__dict__:  # a replica of nn.DataParallel
            for name, own in module._former_parameters.items():
                if own is tensor:
                    return "." + name
        if isinstance(tensor, nn.Parameter):
            if self._parameters is None:
                named = self._model.named_parameters()
                self._parameters = {id(p): (p, "/" + n) for n, p in named}
            other = self._parameters.get(id(tensor))
            if other is not None:
                return other[1]
        return _CONSTANT

    def _operands(self, function: str, args: Any, kwargs: Any) -> tuple[str, ...]:
        names = []
        for value in args:
            if isinstance(value, Tensor):
                names.append(self._name(value))
            elif value.__class__ is float:
                names.append(f"={value!r}")
            elif value.__class__ is tuple or value.__class__ is list:
                names += [self._name(tensor) for tensor in _tensors(value)]
        if kwargs:
            names += [self._name(tensor) for tensor in _tensors(kwargs.values())]
        if function in _FACTORIES:
            return ()
        if function in _LIKE:
            return tuple(names[:1])
        return tuple(names)

    def _call_it(self, tensor: Tensor, name: str) -> None:
        self._frame.names[id(tensor)] = (weakref.ref(tensor), name)

    # --- calls ---------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _COMPOSITE:
            with _Forwarding(self):
                return _body_of(func)(*args, **(kwargs or {}))
        frame = self._frame
        function = function_name(func)
        kwargs = kwargs or {}
        operands = self._operands(function, args, kwargs)
        table = self._table
        if table is None:
            count = self._counts.get((frame.path, function), 0)
            self._counts[frame.path, function] = count + 1
            tail: str | None = f"{function}#{count}"
            address = f"{frame.path}:{tail}"
            first = next((a for a in args if isinstance(a, Tensor)), None)
            version = _version(first)
            result = self.on_call(address, func, args, kwargs)
            new = result is not first or _version(first) != version
            if next(_tensors((result,)), None) is not None:
                self.recorded.calls[address] = (
                    frame.label,
                    operands,
                    new,
                    len(self.recorded.calls) + len(self.recorded.runs),
                )
            if not new:
                return result
        else:
            found = self._find(frame, function, operands)
            if found is None:
                address, tail = f"{frame.path}:{function}#?", None
            else:
                address, tail = found
            self._busy = True  # modules that run now are quantizers
            try:
                result = self.on_call(address, func, args, kwargs)
            finally:
                self._busy = False
            if found is None and isinstance(result, (Tensor, tuple, list)):
                self._unknown.append((frame.label, function, operands))
        self._name_result(result, operands, tail)
        return result

    def _name_result(self, result: Any, operands: tuple[str, ...], tail: str | None) -> None:
        descends = None
        for operand in operands:
            if operand[0] not in "./_=":
                descends = operand
                break
        if descends is None:
            return  # depends on constants and parameters only
        name = descends if tail is None else tail
        if tail is None:
            self._frame.taint.add(name)
        if isinstance(result, Tensor):
            self._frame.names[id(result)] = (weakref.ref(result), name)
        elif isinstance(result, (tuple, list)):
            for position, tensor in enumerate(_tensors(result)):
                self._call_it(tensor, f"{name}.{position}" if position and tail else name)

    def _find(
        self, frame: _Frame, function: str, operands: tuple[str, ...]
    ) -> tuple[str, str | None] | None:
        table, met = self._table, self._met
        entries = table.by_key.get((frame.label, function, operands))
        if entries is not None:
            for entry in entries:
                if entry[0] not in met:
                    met.add(entry[0])
                    if frame.taint and not frame.taint.isdisjoint(operands):
                        self._tainted.append((frame.label, entry[0]))
                    return entry
            self.on_extra(entries[-1][0], f"ran {len(entries) + 1} times, {len(entries)} captured")
        for operand in operands:
            if operand[0] in "./":
                entries = table.by_parameter.get((frame.label, function, operand))
                if entries is None:
                    continue
                if len(entries) == 1 and entries[0][0] not in met:
                    met.add(entries[0][0])
                    return entries[0]
                self.on_extra(
                    entries[-1][0], f"its weight is used on {operands[0]}, which was not captured"
                )
        if (
            sum(o[0] not in "./_=" for o in operands) > 1
        ):  # a layer was skipped: the newest operand says where we are
            latest = table.latest(frame.label, operands)
            if latest is not None:
                entries = table.by_latest.get((frame.label, function, latest), ())
                if len(entries) == 1 and entries[0][0] not in met:
                    known = table.calls[entries[0][0]][1]
                    if _pattern(known) == _pattern(operands):
                        if frame.taint and latest in frame.taint:
                            self._tainted.append((frame.label, entries[0][0]))
                        met.add(entries[0][0])
                        return entries[0]
        return None

    # --- modules -------------------------------------------------------------------------

    def _path(self, module: nn.Module) -> str | None:
        found = self._paths.get(id(module.__dict__))
        if found is None:
            if self._missed:
                return None
            self._missed = True  # once per forward: a module was replaced, or is none of ours
            self._paths = paths_of(self._model, fresh=True)
            found = self._paths.get(id(module.__dict__))
        return None if found is None else found[1]

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        found = self._paths.get(id(module.__dict__))
        path = self._path(module) if found is None else found[1]
        if path is None:
            return
        caller = self._frame
        if not path and len(self._frames) == 1:
            frame = caller
            frame.module = module
        else:
            if len(args) == 1 and isinstance(args[0], Tensor):
                operands = (self._name(args[0]),)
            else:
                operands = tuple([self._name(t) for t in _tensors(args)])
            frame = _Frame(path, self._label(caller.label, path, operands, args), module)
            frame.operands = operands
            self._frames.append(frame)
            self._frame = frame
        names = frame.names
        if len(args) == 1 and isinstance(args[0], Tensor):
            names[id(args[0])] = (weakref.ref(args[0]), "in0")
        else:
            for position, tensor in enumerate(_tensors(args)):
                names[id(tensor)] = (weakref.ref(tensor), f"in{position}")

    def _label(self, caller: str, path: str, operands: tuple[str, ...], args: Any) -> str:
        if self._table is None:
            count = self._counts.get(path, 0)
            self._counts[path] = count + 1
            label = f"{path}@{count}" if count else path
            self.recorded.runs[label] = (
                caller,
                path,
                operands,
                True,
                len(self.recorded.calls) + len(self.recorded.runs),
            )
            return label
        labels = self._table.by_path.get(path, ())
        if len(labels) != 1:
            labels = self._table.by_run.get((caller, path, operands), ())
        for label in labels:
            if label not in self._met_runs:
                self._met_runs.add(label)
                return label
        self._extra_runs.append(path)
        return f"{path}@?"

    def _leave_module(self, module: nn.Module, result: Any) -> None:
        frames = self._frames
        if self._frame.module is module:
            depth = len(frames) - 1
            if not depth:
                return
        else:
            for depth in range(len(frames) - 1, 0, -1):
                if frames[depth].module.__dict__ is module.__dict__:
                    break
            else:
                return
        frame = frames[depth]
        del frames[depth:]
        self._frame = caller = frames[-1]
        table = self._table
        descends = next((o for o in frame.operands if o[0] not in "./_="), None)
        local = _local_name(caller.path, frame.label)
        if isinstance(result, Tensor):
            tensors: Any = (result,)
        elif result is None:
            return
        else:
            tensors = _tensors((result,))
        for position, tensor in enumerate(tensors):
            held = frame.names.get(id(tensor))
            if held is None or held[0]() is not tensor:
                if descends is None or not isinstance(module, torch.jit.ScriptModule):
                    continue  # made of constants only
                held = (None, "")  # compiled code: what happens inside is not seen
            before = caller.names.get(id(tensor))
            same = before is not None and before[0]() is tensor
            if table is None:
                if position == 0 and same and held[1].startswith("in"):
                    caller_, path, operands, _, k = self.recorded.runs[frame.label]
                    self.recorded.runs[frame.label] = (caller_, path, operands, False, k)
                    continue
                if same and held[1].startswith("in"):
                    continue
            else:
                run = table.runs.get(frame.label)
                if run is None or not run[3]:
                    if not same and descends is not None:
                        self_name = descends
                        caller.names[id(tensor)] = (weakref.ref(tensor), self_name)
                    continue
            name = f"{local}.{position}" if position else local
            caller.names[id(tensor)] = (weakref.ref(tensor), name)

    # --- begin and end -------------------------------------------------------------------

    def __enter__(self) -> AddressMode:
        self._reset()
        modes = getattr(_LOCAL, "modes", None)
        if modes is None:
            modes = _LOCAL.modes = []
        hold_hooks(+1)
        modes.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _LOCAL.modes.remove(self)
        hold_hooks(-1)
        self.recorded.index()


@functools.lru_cache(maxsize=65536)
def _local_name(caller: str, label: str) -> str:
    return label[len(caller) + 1 :] if caller and label.startswith(caller + ".") else label


def _pattern(operands: tuple[str, ...]) -> list[int]:
    """Which operands are constants, and which are equal."""
    return [-1 if o[0] in "./_=" else operands.index(o) for o in operands]


def _version(tensor: Tensor | None) -> int:
    if tensor is None or tensor.is_inference():
        return 0
    return tensor._version


class _Forwarding(TorchFunctionMode):
    """Hands calls to a mode that is itself handling a call (and is off meanwhile)."""

    def __init__(self, mode: AddressMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._mode.__torch_function__(func, types, args, kwargs)
