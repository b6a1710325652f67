"""Which module runs, thread by thread: two global hooks that exist while somebody needs them.

Hooks on the modules themselves would be seen by the forwards of other threads, and by a
``torch.export`` or a deep copy under way. The two global hooks look up who follows modules in
*this* thread and return at once where nobody does.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "ModuleFollower",
    "follow_modules",
    "hold_hooks",
    "module_paths",
    "release_hooks",
    "tensors_in_arguments",
    "unfollow_modules",
    "when_unfollowed",
]


class ModuleFollower(Protocol):
    """Is told of the modules that run in its thread."""

    busy: bool
    """What runs now is none of the model's modules: it is not told of that."""
    failed: str | None
    """Path of the innermost module that was left by an exception."""

    @property
    def module_path(self) -> str:
        """Path of the innermost module that is running."""

    def enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """``module`` begins; keyword arguments are not shown by global hooks."""

    def leave_module(self, module: nn.Module, result: Any) -> None:
        """``module`` ends; ``result`` is ``None`` after an exception."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.followers: list[ModuleFollower] = []


_THREAD = _Thread()
_LOCK = threading.RLock()  # a finalizer may release hooks while this thread holds it
_HANDLES: list[Any] = []
_WHEN_UNFOLLOWED: list[Callable[[nn.Module, tuple[Any, ...]], None]] = []
_holders = 0


def hold_hooks() -> None:
    """The hooks exist until as many :func:`release_hooks` were called."""
    global _holders  # noqa: PLW0603 - one count for the process
    with _LOCK:
        _holders += 1
        if not _HANDLES:
            register = torch.nn.modules.module
            _HANDLES.append(register.register_module_forward_pre_hook(_entering))
            _HANDLES.append(register.register_module_forward_hook(_leaving, always_call=True))


def release_hooks() -> None:
    """See :func:`hold_hooks`."""
    global _holders  # noqa: PLW0603
    with _LOCK:
        _holders -= 1
        if not _holders:
            for handle in _HANDLES:
                handle.remove()
            _HANDLES.clear()


def follow_modules(follower: ModuleFollower) -> None:
    """Tell ``follower`` of every module that this thread runs from now on."""
    hold_hooks()
    _THREAD.followers.append(follower)


def unfollow_modules(follower: ModuleFollower) -> None:
    """End what :func:`follow_modules` began."""
    _THREAD.followers.remove(follower)
    release_hooks()


def when_unfollowed(handler: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
    """Call ``handler`` before every module that runs in a thread where nobody follows."""
    _WHEN_UNFOLLOWED.append(handler)


def _entering(module: nn.Module, args: tuple[Any, ...]) -> None:
    followers = _THREAD.followers
    if followers:
        for follower in followers:
            if not follower.busy:
                follower.enter_module(module, args)
    else:
        for handler in _WHEN_UNFOLLOWED:
            handler(module, args)


def _leaving(module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
    for follower in tuple(_THREAD.followers):
        if follower.busy:
            continue
        if result is None and follower.failed is None and sys.exc_info()[0] is not None:
            follower.failed = follower.module_path  # it is on its way out of the deepest module
        follower.leave_module(module, result)


Paths = Mapping[int, tuple[nn.Module, str]]

_PATHS: weakref.WeakKeyDictionary[nn.Module, Paths] = weakref.WeakKeyDictionary()


def module_paths(model: nn.Module, *, fresh: bool = False) -> Paths:
    """Identity of a module's dictionary → the module, and its path in ``model``.

    ``torch.export`` runs proxies in place of modules, which share their dictionary. A module
    that is reachable by several paths has the first; the inside of a ``ScriptModule`` has none.

    Args:
        model: paths are relative to it.
        fresh: look again, because modules were replaced.
    """
    found = None if fresh else _PATHS.get(model)
    if found is None:
        paths: dict[int, tuple[nn.Module, str]] = {}
        compiled: list[str] = []
        for path, module in model.named_modules():
            inside = path.startswith(tuple(compiled))
            if isinstance(module, torch.jit.ScriptModule):
                compiled.append(f"{path}." if path else "")
            if not inside:
                paths[id(module.__dict__)] = (module, path)
        _PATHS[model] = found = paths
    return found


def tensors_in_arguments(values: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results: in tuples, lists and mappings, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in_arguments(value)
        elif isinstance(value, Mapping):
            yield from tensors_in_arguments(value.values())
