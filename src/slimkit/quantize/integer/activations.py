"""Activation functions as integer kernels compute them: by a table with one entry per level.

The curve is computed once for every level that the input can have, so it is the approximation in
the runtime that decides on which side of a rounding boundary an entry falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkit.quantize.integer.arithmetic import centred, fma, multiply, plain
from slimkit.quantize.quantizers.fixed import ActivationQuantizer

__all__ = ["CURVES", "GATES", "curve", "gated", "hard_sigmoid", "sigmoid"]

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "hardswish": F.hardsigmoid,
}
"""Activation functions ``x · g(x)`` → g. Runtimes compute and round both factors."""

# The rational function of ONNX Runtime's (MLAS) and Eigen's logistic: odd over even powers.
_ODD = (4.37031012579801e-11, 1.15627324459942e-07, 6.08574864600143e-05, 8.51377133304701e-03)
_ODD_LAST = 2.48287947061529e-01
_EVEN = (6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03)
_EVEN_LAST = (1.16817656904453e-01, 9.93151921023180e-01)


def sigmoid(reads: ActivationQuantizer, writes: ActivationQuantizer) -> Tensor:
    """The logistic function of every level, as levels of the output.

    Args:
        reads: what rounded the input.
        writes: what will round the output.
    """
    x = (_levels(reads) * reads.scale).clamp(-18.0, 18.0)
    squares = x * x
    odd = _horner(squares, (*_ODD, _ODD_LAST)) * x
    y = (odd / _horner(squares, (*_EVEN, *_EVEN_LAST)) + 0.5).clamp(0.0, 1.0)
    return (y / writes.scale).round() + writes.zero_point


def hard_sigmoid(reads: ActivationQuantizer, writes: ActivationQuantizer) -> Tensor:
    """``clip(x / 6 + 1/2, 0, 1)`` of every level: a change of scale, if the output's is 1/256.

    See :func:`slimkit.runtime.qdq.to_qdq`, which writes it so. Arguments as for :func:`sigmoid`.
    """
    x = _levels(reads) * (reads.scale / 6.0)
    if float(writes.scale) * 256 != 1:
        return (F.hardsigmoid(6.0 * x) / writes.scale).round() + writes.zero_point
    return (x / writes.scale).round() + (writes.zero_point + 128)


CURVES: Mapping[str, Callable[[ActivationQuantizer, ActivationQuantizer], Tensor]] = {
    "hardsigmoid": hard_sigmoid,
    "sigmoid": sigmoid,
}
"""Function name → the table of it."""


def curve(
    func: Callable[..., Any],  # noqa: ARG001 - one signature for all
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],  # noqa: ARG001
    *,
    function: str,
    reads: ActivationQuantizer,
    writes: ActivationQuantizer,
) -> Tensor | None:
    """An activation function of a rounded tensor as multiples of the output's scale.

    Args:
        func: the function.
        args: the tensor first.
        kwargs: the rest.
        function: a key of :data:`CURVES`.
        reads: what rounded the tensor.
        writes: what will round the result.
    """
    x = args[0] if args else None
    if x is None or not plain(x):
        return None
    form = writes.form
    levels = CURVES[function](reads, writes).clamp(form.qmin, form.qmax)
    index = centred(x, reads).add_(reads.zero_point - reads.form.qmin)
    table = (levels - writes.zero_point) * writes.scale
    return table[index.clamp_(0, len(table) - 1).long()]


def gated(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    function: str,
    reads: tuple[ActivationQuantizer, ActivationQuantizer],
    writes: ActivationQuantizer,
) -> Tensor | None:
    """``x · g(x)`` of a rounded tensor: a table for g, and a product.

    Args:
        func: the function.
        args: the tensor first.
        kwargs: the rest.
        function: a key of :data:`GATES`.
        reads: what rounded the tensor, and what rounds the second factor.
        writes: what will round the result.
    """
    inner = "sigmoid" if function == "silu" else "hardsigmoid"
    factor = curve(func, args, kwargs, function=inner, reads=reads[0], writes=reads[1])
    if factor is None:
        return None
    return multiply(torch.mul, (args[0], factor), {}, reads=reads, writes=writes)


def _levels(reads: ActivationQuantizer) -> Tensor:
    """Every integer that the input can be, minus its zero point."""
    device = reads.scale.device
    return torch.arange(reads.form.qmin, reads.form.qmax + 1, device=device) - reads.zero_point


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """A polynomial in float32 with fused multiply-adds, highest power first."""
    first, *others = (torch.tensor(c, device=x.device) for c in coefficients)
    total = first.expand_as(x)
    for coefficient in others:
        total = fma(total, x, coefficient)
    return total
