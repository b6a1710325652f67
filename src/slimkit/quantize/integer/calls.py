"""Which calls of a quantized network are computed like the runtime's integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from slimkit.graph.functions import function_of
from slimkit.quantize.integer.activations import CURVES, GATES, curve, gated
from slimkit.quantize.integer.arithmetic import add, layer, mean_over_space, multiply, product
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer, WeightQuantizer
from slimkit.quantize.specs import Decision

__all__ = ["IntegerCall", "integer_call"]

IntegerCall = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Tensor | None]
"""Takes ``func, args, kwargs`` with rounded data and unrounded weight; ``None``: cannot."""


def integer_call(
    decision: Decision, quantizers: nn.ModuleDict, gate: str | None = None
) -> IntegerCall | None:
    """The arithmetic of the integer kernel behind a call.

    Args:
        decision: of the call.
        quantizers: all of the network.
        gate: of a gated activation function: the quantizer of its second factor.

    Returns:
        ``None`` when plain rounding computes the same, or a quantizer is off or has no scale.
    """
    names = decision.reads if gate is None else (*decision.reads, gate)
    reads = [_usable(quantizers, name) for name in names]
    writes = _usable(quantizers, decision.writes)
    if isinstance(writes, DynamicQuantizer):  # never planned
        return None
    known = [quantizer for quantizer in reads if quantizer is not None]
    if not known or len(known) < len(reads) or (decision.writes and writes is None):
        return None
    if decision.weight is not None:
        weight = quantizers[decision.weight]
        if isinstance(weight, WeightQuantizer) and weight.rounding:
            return partial(layer, reads=known[0], weight=weight, writes=writes)
        return None
    function = function_of(decision.address)
    scaled = [q for q in known if isinstance(q, ActivationQuantizer)]
    if len(scaled) == 2:
        return _of_two(function, (scaled[0], scaled[1]), writes)
    return None if len(scaled) != 1 or writes is None else _of_one(function, scaled[0], writes)


def _of_two(
    function: str,
    reads: tuple[ActivationQuantizer, ActivationQuantizer],
    writes: ActivationQuantizer | None,
) -> IntegerCall | None:
    if function in ("matmul", "bmm"):
        return partial(product, reads=reads, writes=writes)
    if writes is None:
        return None
    if function in GATES:
        return partial(gated, function=function, reads=reads, writes=writes)
    kernel = {"add": add, "mul": multiply}.get(function)
    return None if kernel is None else partial(kernel, reads=reads, writes=writes)


def _of_one(
    function: str, reads: ActivationQuantizer, writes: ActivationQuantizer
) -> IntegerCall | None:
    if function in CURVES:
        return partial(curve, function=function, reads=reads, writes=writes)
    if function in ("adaptive_avg_pool2d", "mean"):
        return partial(mean_over_space, reads=reads, writes=writes)
    return None


def _usable(
    quantizers: nn.ModuleDict, name: str | None
) -> ActivationQuantizer | DynamicQuantizer | None:
    quantizer = quantizers[name] if name is not None and name in quantizers else None
    if not isinstance(quantizer, ActivationQuantizer | DynamicQuantizer):
        return None
    return quantizer if quantizer.rounding and quantizer.ready else None
