"""Monkey patching for as long as a forward runs: functions are replaced and always put back.

Handlers hear only of the calls of the thread that started them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimkit.errors import ModelError
from slimkit.registry import import_object

__all__ = ["ForwardScope", "Handler", "Interceptor"]

Handler = Callable[[Callable[[], Any]], Any]
"""Answers one call; its argument makes the call that would have happened without it."""

_MISSING = object()


@dataclass
class _Patch:
    """One replaced attribute, and who listens to it: the latest one is asked first."""

    owner: Any
    attribute: str
    own: Any  # what the owner itself held; _MISSING when it inherited the attribute
    handlers: list[tuple[int, Handler]] = field(default_factory=list)  # (thread, handler)


_patches: dict[str, _Patch] = {}
_lock = threading.RLock()


class Interceptor:
    """Hands the calls of some functions to handlers while it is active.

    Several interceptors may be active at once on the same function and may end in any order;
    when the last one ends, the original is back. Calls of other threads than the one that
    started it pass by.

    Args:
        handlers: ``"package.module:function"`` or ``"package.module:Class.method"`` → handler.
    """

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.handlers = dict(handlers)
        self.active = False
        self._thread = 0

    def start(self) -> None:
        """Begin to intercept.

        Raises:
            ModelError: a function cannot be replaced; none is. Or another thread is in the
                middle of it: one at a time.
        """
        with _lock:
            thread = threading.get_ident()
            if self.active and self.handlers and self._thread != thread:
                raise ModelError(
                    "its calls are followed in another thread at this moment: one at a time",
                    where=", ".join(self.handlers),
                    hint="a student and a teacher of its own for each thread",
                )
            if self.active:
                return
            replaced: list[str] = []
            try:
                for reference, handler in self.handlers.items():
                    if reference not in _patches:
                        _patches[reference] = _patched(reference)
                    _patches[reference].handlers.append((thread, handler))
                    replaced.append(reference)
            except BaseException:
                self._release(replaced, thread)
                raise
            self.active, self._thread = True, thread

    def stop(self, *, of_any_thread: bool = False) -> None:
        """End what this thread started, or any; may be called twice."""
        with _lock:
            if self.active and (of_any_thread or self._thread == threading.get_ident()):
                self._release(self.handlers, self._thread)
                self.active = False

    def _release(self, references: Iterable[str], thread: int) -> None:
        for reference in references:
            patch = _patches[reference]
            patch.handlers.remove((thread, self.handlers[reference]))
            if not patch.handlers:
                _restore(_patches.pop(reference))


def _patched(reference: str) -> _Patch:
    owner, attribute = _owner(reference)
    raw = inspect.getattr_static(owner, attribute)
    own = vars(owner).get(attribute, _MISSING)
    patch = _Patch(owner, attribute, own)
    plain = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = functools.partial(plain, *args, **kwargs)
        thread = threading.get_ident()
        for started_in, handler in tuple(patch.handlers):
            if started_in == thread:
                call = functools.partial(handler, call)
        return call()

    wrapped: Any = type(raw)(wrapper) if isinstance(raw, staticmethod | classmethod) else wrapper
    try:
        setattr(owner, attribute, wrapped)
    except (TypeError, AttributeError) as error:  # a type written in C
        raise ModelError(f"it cannot be replaced: {error}", where=reference) from error
    return patch


def _owner(reference: str) -> tuple[Any, str]:
    """The module or class that holds a function, and the function's name in it."""
    module, _, path = reference.partition(":")
    outer, _, attribute = path.rpartition(".")
    owner = import_object(f"{module}:{outer}") if outer else importlib.import_module(module)
    return owner, attribute


def _restore(patch: _Patch) -> None:
    if patch.own is _MISSING:
        delattr(patch.owner, patch.attribute)
    else:
        setattr(patch.owner, patch.attribute, patch.own)


class ForwardScope:
    """Does something before and after every forward of one model, but not of its copies.

    Args:
        model: gets two hooks until :meth:`close`.
        enter: called with the arguments of the forward.
        leave: called when it has ended, with an error or without.
    """

    def __init__(
        self,
        model: nn.Module,
        enter: Callable[[tuple[Any, ...], dict[str, Any]], None],
        leave: Callable[[], None],
    ) -> None:
        # closures, not methods: deep copies of the model share them instead of copying us
        def before(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if caller is model:
                enter(args, kwargs)

        def after(caller: nn.Module, _args: Any, _output: Any) -> None:
            if caller is model:
                leave()

        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
