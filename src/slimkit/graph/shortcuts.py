"""Shape-only evaluation: a forward does not compute what only its shapes are wanted of.

Convolutions and matrix products hand out zeros of the right shape, everything else is computed
as always. That is as good until a value decides what happens next: boxes that are suppressed, a
number that Python reads. Such operators are recognised here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ValuesNeededError", "decides", "reads_values", "without_values"]

_aten = torch.ops.aten
_INDEXED = frozenset({_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default})
_DECIDING = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_READING = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr"})


class ValuesNeededError(BaseException):
    """A value decides what the forward does; not an ``Exception``, which a model may catch."""


def reads_values(func: Callable[..., Any]) -> bool:
    """Whether this Python-level function looks at numbers without an operator.

    Args:
        func: such as ``torch.Tensor.tolist``.
    """
    return getattr(func, "__name__", "") in _READING


def decides(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether what this operator returns, beyond its numbers, depends on numbers.

    Args:
        func: an operator; those of other libraries than torch are not known, so they may.
        args: its arguments.
    """
    if func.namespace != "aten":
        return True
    if func in _INDEXED:  # by a mask: as many elements as it has ones
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return not _DECIDING.isdisjoint(func.tags)


def without_values(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The operator's result; zeros, if to compute it is costly.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: its arguments by name.
    """
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    alike = len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    shape = _COSTLY[func](*args) if func in _COSTLY and alike and not kwargs else None
    if shape is None:  # also where it is wrong: the operator itself says best why
        return func(*args, **kwargs)
    zeros = torch.zeros(shape, dtype=tensors[0].dtype, device=tensors[0].device)
    if any(_channels_last(arg) for arg in args[:2]):
        return zeros.contiguous(memory_format=torch.channels_last)
    return zeros


def _channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.stride(1) == 1


def _product(a: Tensor, b: Tensor) -> list[int] | None:
    fits = a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    return [*a.shape[:-1], b.shape[-1]] if fits else None


def _sum_and_product(x: Tensor, a: Tensor, b: Tensor) -> list[int] | None:
    shape = _product(a, b)
    fits = shape is not None and x.ndim and x.shape[-1] in (1, shape[-1])
    return shape if fits else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int] | None:
    wanted = weight.shape[0] if transposed else weight.shape[1] * groups
    if x.ndim != weight.ndim or x.shape[1] != wanted:
        return None
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    sizes = []
    for i, size in enumerate(x.shape[2:]):
        step, border, apart, beyond = (
            values[i % len(values)] for values in (stride, padding, dilation, output_padding)
        )
        reach = apart * (weight.shape[2 + i] - 1)
        if transposed:
            sizes.append((size - 1) * step - 2 * border + reach + beyond + 1)
        else:
            sizes.append((size + 2 * border - reach - 1) // step + 1)
    return [x.shape[0], channels, *sizes] if min(sizes, default=1) > 0 else None


_COSTLY: dict[torch._ops.OpOverload, Callable[..., list[int] | None]] = {
    _aten.convolution.default: _convolution,
    _aten.addmm.default: _sum_and_product,
    _aten.baddbmm.default: _sum_and_product,
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
}
