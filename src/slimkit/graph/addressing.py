"""A mode that tells, at every call of a torch function, which captured call it is.

Capture, which runs once in evaluation mode, and the quantizers, which act during every training
step, give a call the same address because both derive from :class:`AddressMode`. During capture
calls are counted and written into a :class:`~slimkit.graph.call_table.CallTable`; afterwards they
are matched with that table (:mod:`slimkit.graph.alignment`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimkit.graph.alignment import Alignment
from slimkit.graph.call_table import (
    CONSTANT,
    CallTable,
    CapturedCall,
    ModuleRun,
    Operands,
    first_live,
    local,
)
from slimkit.graph.frames import Frame
from slimkit.graph.functions import COMPOSITE, FACTORIES, LIKE, body_of, function_name
from slimkit.graph.module_hooks import (
    follow_modules,
    module_paths,
    tensors_in_arguments,
    unfollow_modules,
)

__all__ = ["AddressMode"]


class AddressMode(TorchFunctionMode):
    """A mode that gives every torch function called inside ``model`` its address.

    Enter it around one forward of ``model``, or of one of its modules alone; each time it begins
    afresh. Subclasses override :meth:`on_call`. It follows modules of its own thread only, so the
    same model can run in others meanwhile, with or without a mode. Not re-entrant.

    Args:
        model: paths are relative to it; a module reachable by several paths has the first.
        table: match calls with this one; by default calls are counted, and :attr:`recorded`.
        planned: addresses of calls that must not be mistaken, see
            :class:`~slimkit.graph.alignment.Alignment`. Only with a table.

    Raises:
        AddressError: inside or when it is left: a planned call cannot be told.
    """

    def __init__(
        self, model: nn.Module, table: CallTable | None = None, planned: Set[str] = frozenset()
    ) -> None:
        super().__init__()
        self._followed = model
        self._table, self._planned = table, planned
        self._paths = module_paths(model)
        self.busy = False
        self._reset()

    def _reset(self) -> None:
        self._frame = Frame("", "", self._followed)
        self._frames = [self._frame]
        self._recording = _Recording()
        self._alignment = None if self._table is None else Alignment(self._table, self._planned)
        self._parameters: dict[int, tuple[Tensor, str]] | None = None
        self._looked_again = False
        self._examples = False  # the model takes a list, whose members are examples
        self._outermost: nn.Module | None = None
        self.failed: str | None = None

    @property
    def module_path(self) -> str:
        """The path of the innermost module that is running (``""`` is the model itself)."""
        return self._frame.path

    @property
    def recorded(self) -> CallTable:
        """What was called; without a table only."""
        return CallTable(self._recording.calls, self._recording.runs)

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What to do at a call; the default just makes it.

        Torch functions called from here are not addressed, modules not followed.

        Args:
            address: ``"module:function#ordinal"``; of a call that the table does not have
                ``"module:function#?"``.
            func: the torch function; call it as ``func(*args, **kwargs)``.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The result that the model gets to see.
        """
        return func(*args, **kwargs)

    def on_module(self, frame: Frame, args: tuple[Any, ...]) -> None:
        """A module begins to run; the default does nothing."""

    def __enter__(self) -> AddressMode:
        self._reset()
        follow_modules(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        unfollow_modules(self)
        if self._alignment is not None and error[0] is None:
            self._alignment.check()

    def check_complete(self) -> None:
        """Raise unless every planned call of the table has run.

        Raises:
            AddressError: names one that has not.
        """
        if self._alignment is not None:
            self._alignment.check(complete=True)

    # Calls ------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITE:
            with _Forwarding(self):
                return body_of(func)(*args, **kwargs)
        frame, function = self._frame, function_name(func)
        operands = self._operands(function, args, kwargs)
        if self._alignment is None:
            return self._recorded_call(frame, function, operands, (func, args, kwargs))
        found = self._alignment.find(frame, function, operands)
        if found is not None:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            version = _version(first)
            result = self._handled(found[0], func, args, kwargs)
            name = found[1] or first_live(operands)
            if first is not result and _version(first) != version:
                self._name_result(frame, first, operands, name)  # changed in place, not rounded
        else:
            result = self._handled(f"{frame.path}:{function}#?", func, args, kwargs)
            if not isinstance(result, Tensor | tuple | list):
                return result  # a size or the like
            repeat = self._alignment.name_of_repeat
            name = repeat(frame, function, operands) if self._examples else None
            if name is None:
                self._alignment.unknown(frame, function, operands)
                name = first_live(operands)
                if name is not None:
                    frame.tainted.add(name)
        self._name_result(frame, result, operands, name)
        return result

    def _handled(
        self, address: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.busy = True  # a module that runs now is a quantizer, or something else of ours
        try:
            return self.on_call(address, func, args, kwargs)
        finally:
            self.busy = False

    def _recorded_call(
        self,
        frame: Frame,
        function: str,
        operands: Operands,
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
    ) -> Any:
        name = self._recording.next_call(frame.path, function)
        address = f"{frame.path}:{name}"
        first = call[1][0] if call[1] and isinstance(call[1][0], Tensor) else None
        version = _version(first)
        result = self._handled(address, *call)
        new = result is not first or _version(first) != version
        self._recording.add_call(address, frame.label, operands, new)
        if new:
            self._name_result(frame, result, operands, name)
            if first is not result and _version(first) != version:
                self._name_result(frame, first, operands, name)  # ``x[:, :2] = y``
        return result

    def _name_result(self, frame: Frame, result: Any, operands: Operands, name: str | None) -> None:
        if name is None or first_live(operands) is None:
            return  # made of constants and parameters only: as good as a constant
        if isinstance(result, Tensor):
            frame.give_name(result, name)
        elif isinstance(result, tuple | list):
            several = name not in operands  # a transparent call: all results are its operand
            for position, tensor in enumerate(tensors_in_arguments(result)):
                frame.give_name(tensor, f"{name}.{position}" if position and several else name)

    def _operands(
        self, function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Operands:
        if function in FACTORIES:
            return ()
        names: list[str] = []
        for value in args:
            if isinstance(value, Tensor):
                names.append(self._name(value))
            elif value.__class__ is float:
                names.append(f"={value!r}")
            elif value.__class__ is tuple or value.__class__ is list:
                listed = [self._name(tensor) for tensor in tensors_in_arguments(value)]
                names += [n for n, _ in itertools.groupby(listed)] if self._examples else listed
        if kwargs:
            names += [self._name(tensor) for tensor in tensors_in_arguments(kwargs.values())]
        return tuple(names[:1]) if function in LIKE else tuple(names)

    def _name(self, tensor: Tensor) -> str:
        name = self._frame.name_of(tensor)
        if name is None and isinstance(tensor, nn.Parameter):
            if self._parameters is None:
                named = self._followed.named_parameters()
                self._parameters = {id(p): (p, "/" + path) for path, p in named}
            name = self._parameters.get(id(tensor), (None, None))[1]
        return CONSTANT if name is None else name

    # Modules ----------------------------------------------------------------------------------

    def enter_alone(self, module: nn.Module, args: tuple[Any, ...], label: str) -> None:
        """Enter this mode for one run of a module that has begun; it ends with the module."""
        self.__enter__()
        self._outermost = module
        self.enter_module(module, args, label)

    def enter_module(
        self, module: nn.Module, args: tuple[Any, ...], label: str | None = None
    ) -> None:
        """A module begins to run (:class:`~slimkit.graph.module_hooks.ModuleFollower`)."""
        found = self._paths.get(id(module.__dict__))
        path = self._path_again(module) if found is None else found[1]
        if path is None:
            return
        frame = self._frame
        root = not path and len(self._frames) == 1
        caller: Callable[[Tensor], str | None] = (lambda _: "example") if root else frame.made
        named = [(tensor, name) for name, tensor in _named_inputs(args, caller)]
        self._examples |= root and any(isinstance(argument, list) for argument in args)
        if root:
            frame.module = module
        else:
            operands = tuple([self._name(tensor) for tensor in tensors_in_arguments(args)])
            if self._examples:
                operands = tuple([name for name, _ in itertools.groupby(operands)])
            if label is None:
                runs = self._recording if self._alignment is None else self._alignment
                label = runs.label(frame.label, path, operands)
            frame = Frame(path, label, module, operands)
            self._frames.append(frame)
            self._frame = frame
        for tensor, name in named:
            frame.give_name(tensor, name)
        self.on_module(frame, args)

    def _path_again(self, module: nn.Module) -> str | None:
        """Once per forward look whether a module was replaced; others are none of ours."""
        if self._looked_again:
            return None
        self._looked_again = True
        self._paths = module_paths(self._followed, fresh=True)
        found = self._paths.get(id(module.__dict__))
        return None if found is None else found[1]

    def leave_module(self, module: nn.Module, result: Any) -> None:
        """It ends; the caller calls its results by the module's name."""
        frame = self._left(module)
        if frame is not None and result is not None:
            for position, tensor in enumerate(tensors_in_arguments((result,))):
                self._name_module_result(frame, tensor, position)
        if self._outermost is module:
            self.__exit__(None if self.failed is None else RuntimeError, None, None)

    def _left(self, module: nn.Module) -> Frame | None:
        """Forget the frame of ``module``, and those inside that an exception skipped."""
        frames = self._frames
        for depth in range(len(frames) - 1, 0, -1):
            if frames[depth].module.__dict__ is module.__dict__:
                frame = frames[depth]
                del frames[depth:]
                self._frame = frames[-1]
                return frame
        return None

    def _name_module_result(self, frame: Frame, tensor: Tensor, position: int) -> None:
        caller, descends = self._frame, first_live(frame.operands)
        made = frame.made(tensor)
        if made is None:
            if descends is None or not isinstance(frame.module, torch.jit.ScriptModule):
                return  # made of constants only
            made = ""  # compiled code: what happens inside is not seen
        handed_on = caller.made(tensor) is not None
        if self._alignment is None:
            if handed_on and made[:2] == "in" and made[2:].isdigit():
                if not position:
                    self._recording.hands_on(frame.label)
                return
        else:
            run = self._alignment.table.runs.get(frame.label)
            if run is None or not run.new:
                if not handed_on and descends is not None:
                    caller.give_name(tensor, descends)
                    if run is None:
                        caller.tainted.add(descends)
                return
        name = local(caller.path, frame.label)
        caller.give_name(tensor, f"{name}.{position}" if position else name)


class _Recording:
    """Counts calls and runs, and notes them."""

    def __init__(self) -> None:
        self.calls: dict[str, CapturedCall] = {}
        self.runs: dict[str, ModuleRun] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def _count(self, path: str, function: str) -> int:
        count = self._counts.get((path, function), 0)
        self._counts[path, function] = count + 1
        return count

    def _position(self) -> int:
        return len(self.calls) + len(self.runs)

    def next_call(self, path: str, function: str) -> str:
        """``"relu#1"`` for the second ``relu`` of a module."""
        return f"{function}#{self._count(path, function)}"

    def add_call(self, address: str, run: str, operands: Operands, new: bool) -> None:
        self.calls[address] = CapturedCall(run, operands, new, self._position())

    def label(self, caller: str, path: str, operands: Operands) -> str:
        """``"head"`` for the first run of a module, ``"head@1"`` for the second."""
        count = self._count(path, "")
        label = f"{path}@{count}" if count else path
        self.runs[label] = ModuleRun(caller, path, operands, True, self._position())
        return label

    def hands_on(self, label: str) -> None:
        """A run returned what it was given."""
        self.runs[label] = self.runs[label]._replace(new=False)


def _version(tensor: Tensor | None) -> int:
    """How often it was changed in place."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


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


def _named_inputs(
    args: Iterable[Any], caller: Callable[[Tensor], str | None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a module is called with, and their names: in0, in1 and so on.

    Neighbours in a list that are called the same are examples (a detector's images), of which
    there may be any number: they share a name here, too.

    Args:
        args: of the call.
        caller: what a tensor is called where the module is called.
    """
    position = -1
    for argument in args:
        before: str | None = None
        for tensor in tensors_in_arguments((argument,)):
            name = caller(tensor) if isinstance(argument, list) else None
            position += name is None or name != before
            before = name
            yield f"in{position}", tensor
