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
    type(None), bool, int, float, complex, str, bytes, type, ModuleType, FunctionType,
    BuiltinFunctionType, torch.dtype, torch.device, torch.Size, np.dtype,
)  # fmt: skip
"""What cannot change, or not be seen into."""


@contextlib.contextmanager
def undone(things: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Whatever happens inside to these things and to random numbers is undone at the end.

    Put back are parameters, buffers and gradients, training flags, and what modules keep beside
    them: Python values, lists, dictionaries, sets, tensors, generators of random numbers and
    plain objects of those, in place, so that whoever else holds one of them sees it too. The
    state of the random numbers of torch, NumPy and Python is put back. Of who listens by a
    hook that is a method, the attributes and what they contain are put back, not the tensors.
    Files, objects of compiled extensions, and variables of functions are not.

    Args:
        things: modules, with all inside of them, and other objects.
        device: whose random state is kept beside the CPU's.
    """
    undo: list[Undo] = []
    seen: set[int] = set()
    for thing in things:
        if isinstance(thing, nn.Module):  # the tensors of scripted ones are nowhere else
            for tensor in (*thing.parameters(), *thing.buffers()):
                _remember(tensor, undo, seen)
        _remember(thing, undo, seen)
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


def _remember(thing: Any, undo: list[Undo], seen: set[int]) -> None:
    """Add what brings ``thing`` back to what it is now, and all that is reached from it."""
    found = [thing]
    while found:
        value = found.pop()
        if isinstance(value, _FIXED) or id(value) in seen:
            continue
        seen.add(id(value))
        inside, step = _opened(value)
        found.extend(inside)
        undo.extend(step)


def _opened(value: Any) -> tuple[Iterable[Any], list[Undo]]:
    """What is to be followed in a value, and what brings itself back."""
    if isinstance(value, Tensor):
        known = value.layout is torch.strided and not value.is_meta
        return (), [_tensor(value)] if known else []
    if isinstance(value, (dict, list, set, deque)):
        return list(value.values() if isinstance(value, dict) else value), [_container(value)]
    if isinstance(value, (tuple, frozenset)):
        return value, []
    if isinstance(value, (random.Random, torch.Generator, np.random.Generator)):
        return (), [_generator(value)]
    if isinstance(value, np.ndarray):
        return (), [partial(np.copyto, value, value.copy())]
    if isinstance(value, partial):
        methods = [item for item in (value.func, *value.args) if callable(item)]
        return [item for item in methods if isinstance(item, (MethodType, partial))], []
    if isinstance(value, MethodType):
        return _owner(value.__self__)
    followed = isinstance(value, nn.Module) or not type(value).__module__.startswith("torch.")
    return [vars(value)] if followed and hasattr(value, "__dict__") else [], []


def _owner(owner: Any) -> tuple[Iterable[Any], list[Undo]]:
    """Whose method it is. Not all that it leads to: that may be a teacher or a data set."""
    if isinstance(owner, nn.Module):
        return [owner], []
    if isinstance(owner, _FIXED) or not hasattr(owner, "__dict__"):
        return (), []
    held = [vars(owner), *vars(owner).values()]
    return (), [_container(item) for item in held if isinstance(item, (dict, list, set, deque))]


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
