"""Which thread exports: torch says it of the whole process only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from slimkit.locking import one_at_a_time

__all__ = ["exporting", "is_exporting"]

_here = threading.local()


def is_exporting() -> bool:
    """Whether this thread exports: what ``torch.compiler.is_exporting`` says of all threads.

    It exports inside :func:`exporting`, and inside a ``torch.export.export`` of the user's own,
    which computes without values.
    """
    if not torch.compiler.is_exporting():
        return False
    if getattr(_here, "depth", 0):
        return True
    from torch._subclasses.fake_tensor import FakeTensorMode

    return any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


@contextlib.contextmanager
def exporting() -> Iterator[None]:
    """This thread traces a network inside, and no other one: they wait for each other.

    torch's tracer replaces ``__call__`` and ``__getattr__`` of all modules in all threads. What
    other threads compute meanwhile is none of its business, and passes it by.
    """
    with one_at_a_time(), _blind_to_other_threads():
        _here.depth = getattr(_here, "depth", 0) + 1
        try:
            yield
        finally:
            _here.depth -= 1


@contextlib.contextmanager
def _blind_to_other_threads() -> Iterator[None]:
    """The tracers' own methods see the modules of this thread alone."""
    from torch.fx.experimental import proxy_tensor

    owner = threading.get_ident()

    def call_module(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(
            tracer: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
        ) -> Any:
            if threading.get_ident() != owner:
                return forward(*args, **kwargs)
            return original(tracer, module, forward, args, kwargs)

        return called

    def found(original: Callable[..., Any]) -> Callable[..., Any]:
        def got(tracer: Any, name: str, value: Any, cache: Any) -> Any:
            if threading.get_ident() != owner:
                return value
            return original(tracer, name, value, cache)

        return got

    kinds = (proxy_tensor.PythonKeyTracer, proxy_tensor._ModuleStackTracer)
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for kind in kinds:
            for name, seen in (("call_module", call_module), ("getattr", found)):
                original = vars(kind).get(name)
                if original is not None:
                    setattr(kind, name, seen(original))
                    replaced.append((kind, name, original))
        yield
    finally:
        for kind, name, original in reversed(replaced):
            setattr(kind, name, original)
