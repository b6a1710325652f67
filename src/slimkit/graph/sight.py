"""Which tensors each module's ``forward`` had in hand: what code that did not run could read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as registry

__all__ = ["Sight"]


class Sight:
    """Notes what goes into every module and comes out of it, while it is entered.

    The body of a module's ``forward`` can name its own arguments, what the modules that it calls
    return, and what the functions that it calls return (these the capture adds by :meth:`see`).
    Tensors inside a module that it calls are out of its sight.

    Args:
        model: whose modules are watched.
        numbers: the value numbers of the tensors in nested arguments.

    Attributes:
        seen: path of a module that ran → value numbers, in order.
    """

    def __init__(self, model: nn.Module, numbers: Callable[[Any], Iterable[int]]) -> None:
        self.seen: dict[str, dict[int, None]] = {"": {}}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._numbers = numbers
        self._running = [""]
        self._thread = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Sight:
        self._running = [""]
        self._thread = threading.get_ident()
        self._hooks = [
            registry.register_module_forward_pre_hook(self._entered),
            registry.register_module_forward_hook(self._left, with_kwargs=True, always_call=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def see(self, path: str, values: Iterable[int]) -> None:
        """The body of the module at ``path`` has these values in hand."""
        self.seen.setdefault(path, {}).update(dict.fromkeys(values))

    def _entered(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        path = self._paths.get(id(module))
        if path is not None and threading.get_ident() == self._thread:
            self._running.append(path)

    def _left(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """``rest`` is (keywords, result); the result alone after an exception."""
        path = self._paths.get(id(module))
        if path is None or threading.get_ident() != self._thread:
            return
        while len(self._running) > 1 and self._running.pop() != path:
            pass  # left by an exception
        *keywords, result = rest
        given = list(self._numbers((args, keywords)))
        self.see(path, given)
        self.see(self._running[-1], given)
        if result is not None:
            self.see(self._running[-1], self._numbers(result))
