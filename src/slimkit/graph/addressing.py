"""Addresses of tensor functions: the same name for the same call in every forward of a model.

An address is ``"layer1.0:conv2d#0"``: the path of the innermost running module, the
normalised name of the torch function, and how many calls of that function the module made
before in this forward. Capture, which runs once in evaluation mode, and the quantizer,
which acts during every training step, get equal addresses because both derive from
:class:`AddressMode`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["AddressMode", "function_name", "function_of"]

_COMPOSITE: frozenset[Any] = frozenset({F.multi_head_attention_forward})
"""Python functions made of several layers: their inside is addressed, not the whole."""


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


class AddressMode(TorchFunctionMode):
    """A mode that gives every torch function called inside ``model`` its address.

    Enter it around one forward; ordinals start at 0 each time it is entered. Subclasses
    override :meth:`on_call`. Modules are followed by hooks that exist only while the mode
    is active, so it also works while ``torch.export`` traces the module, and a module that
    is deep-copied or pickled never carries them. Not re-entrant.

    Args:
        model: paths are relative to it; a module reachable by several paths has the first.
        followed: some of ``model.named_modules()``, where only a part of the model will run: hooks
            on a large model take longer than a small part of it.
    """

    def __init__(
        self, model: nn.Module, followed: Sequence[tuple[str, nn.Module]] | None = None
    ) -> None:
        super().__init__()
        self._named = list(model.named_modules()) if followed is None else followed
        self._handles: list[RemovableHandle] = []
        self._stack: list[str] = [""]
        self._counts: dict[tuple[str, str], int] = {}

    @property
    def module_path(self) -> str:
        """The path of the innermost module that is running (``""`` is the model itself)."""
        return self._stack[-1]

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """What to do at a call; the default just makes it.

        Torch functions called from here are not addressed.

        Args:
            address: ``"module:function#ordinal"``.
            func: the torch function; call it as ``func(*args, **kwargs)``.
            args: positional arguments.
            kwargs: keyword arguments.

        Returns:
            The result that the model gets to see.
        """
        return func(*args, **kwargs)

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
        module = self._stack[-1]
        name = function_name(func)
        ordinal = self._counts.get((module, name), 0)
        self._counts[(module, name)] = ordinal + 1
        return self.on_call(f"{module}:{name}#{ordinal}", func, args, kwargs or {})

    def __enter__(self) -> AddressMode:
        self._stack = [""]
        self._counts = {}
        for path, module in self._named:
            if path and not isinstance(module, torch.jit.ScriptModule):
                self._follow(path, module)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _follow(self, path: str, module: nn.Module) -> None:
        depths: list[int] = []  # a module may call itself; exceptions may skip an exit

        def enter(_module: nn.Module, _args: Any) -> None:
            depths.append(len(self._stack))
            self._stack.append(path)

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            del self._stack[depths.pop() :]

        self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
        self._handles.append(module.register_forward_hook(leave))


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
