"""Torch functions by name, and the addresses that are made of these names.

An address is ``"layer1.0:conv2d#0"``: the path of the innermost running module, the normalised
name of the torch function, and an ordinal. The ordinal is what the capture counted; it only
tells calls apart, and later forwards are matched without counting
(:mod:`slimkit.graph.call_table`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["COMPOSITE", "FACTORIES", "LIKE", "body_of", "function_name", "function_of"]

COMPOSITE: frozenset[Any] = frozenset({F.multi_head_attention_forward})
"""Python functions made of several layers: their inside is addressed, not the whole."""

FACTORIES = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"}
    | {"randint_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
)
"""Functions whose result has shape, type and device of the argument, but none of its values."""

LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
"""Functions that read values of the first argument, and of the second only its form."""


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
def body_of(func: Any) -> Callable[..., Any]:
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
