"""Trying something on a model and leaving no trace of it."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["undone"]

Undo = Callable[[], object]

_FIXED = (
    type(None), bool, int, float, complex, str, bytes, type, ModuleType, FunctionType, MethodType,
    BuiltinFunctionType, torch.dtype, torch.device, torch.Size, np.dtype,
)  # fmt: skip
"""What cannot change, or belongs to another: the owner of a method that is a hook."""


@contextlib.contextmanager
def undone(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Whatever happens inside to these modules and to random numbers is undone at the end.

    Put back are parameters, buffers and gradients, training flags, and what modules keep beside
    them: Python values, lists, dictionaries, sets, tensors, generators of random numbers and
    plain objects of those, in place, so that whoever else holds one of them sees it too. The
    state of the random numbers of torch, NumPy and Python is put back. Files, and objects of
    compiled extensions, are not.

    Args:
        modules: which; their submodules are meant too.
        device: whose random state is kept beside the CPU's.
    """
    undo: list[Undo] = []
    seen: set[int] = set()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            _remember(tensor, undo, seen)  # those of scripted modules are nowhere else
        _remember(module, undo, seen)
    devices = [device] if device.type == "cuda" else []
    drawn, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(numbers)  # noqa: NPY002
        with torch.no_grad():
            for step in undo:
                step()


def _remember(value: Any, undo: list[Undo], seen: set[int]) -> None:
    """Add what brings ``value`` back to what it is now, and all that is reached from it."""
    if isinstance(value, _FIXED) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_meta:
            undo.append(_tensor(value))
    elif isinstance(value, (dict, list, set, deque)):
        undo.append(_container(value))
        for item in list(value.values() if isinstance(value, dict) else value):
            _remember(item, undo, seen)
    elif isinstance(value, (tuple, frozenset)):
        for item in value:
            _remember(item, undo, seen)
    elif isinstance(value, (random.Random, torch.Generator, np.random.Generator)):
        undo.append(_generator(value))
    elif isinstance(value, np.ndarray):
        array = value.copy()
        undo.append(lambda: np.copyto(value, array))
    elif hasattr(value, "__dict__") and (isinstance(value, nn.Module) or not _is_torchs(value)):
        _remember(vars(value), undo, seen)


def _tensor(tensor: Tensor) -> Undo:
    held, gradient = tensor.detach().clone(), tensor.grad if tensor.is_leaf else None

    def back() -> None:
        if tensor.shape != held.shape:
            tensor.data = held
        elif not torch.equal(tensor, held):
            tensor.detach().copy_(held)
        if tensor.is_leaf:
            tensor.grad = gradient

    if tensor.is_leaf:
        tensor.grad = None  # so that what comes is not added to it
    return back


def _generator(source: random.Random | torch.Generator | np.random.Generator) -> Undo:
    if isinstance(source, random.Random):
        return partial(source.setstate, source.getstate())
    if isinstance(source, torch.Generator):
        return partial(source.set_state, source.get_state())
    return partial(setattr, source.bit_generator, "state", source.bit_generator.state)


def _container(value: Any) -> Undo:
    held: Any = dict(value) if isinstance(value, dict) else list(value)

    def back() -> None:
        found = list(value.items() if isinstance(value, dict) else value)
        wanted = list(held.items() if isinstance(value, dict) else held)
        if len(found) == len(wanted) and all(map(_same, found, wanted)):
            return
        value.clear()
        if isinstance(value, (dict, set)):
            value.update(held)
        else:
            value.extend(held)

    return back


def _same(one: Any, other: Any) -> bool:
    """One entry of a container; of a dictionary a key and its value."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
    return one is other


def _is_torchs(value: object) -> bool:
    """Whether it is of torch itself, such as what a compiled model keeps."""
    return type(value).__module__.partition(".")[0] == "torch"
