"""What an integer kernel computes, bit by bit, in floating point.

Fake quantization rounds where the runtime rounds, but sums products in another order and
with other intermediate values. Now and then a value falls on the other side of a rounding
boundary; in a deep network such flips multiply from layer to layer until the outputs of
PyTorch and of the runtime differ by as much as float and integer outputs do. In evaluation
the quantized model therefore does the kernels' own arithmetic:

* products of 8-bit integers are summed exactly: they are whole numbers below 2^24, which
  float32 holds, whatever the order;
* the int32 bias is added, and the sum brought to the output's scale by one float32 factor
  ``s_x · s_w / s_y``, rounded half to even (Jacob et al., 2018,
  https://arxiv.org/abs/1712.05877, equation 4);
* sums of two tensors are two fused multiply-adds, as in ONNX Runtime's vector kernel; products of
  two tensors are one multiplication of integers and one by ``s_a · s_b / s_c``;
* linear layers on more than two dimensions, and those with scales of each batch, leave the
  integers first: their bias is a float.

The results were compared with ONNX Runtime 1.32 on x86 and found equal: with VNNI, and without it
for targets that keep pairs of products within 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.quantizers.fixed import ActivationQuantizer, WeightQuantizer
from slimkit.quantize.scales import along
from slimkit.runtime.fake_quantize import fits_half, quantized_integers, room_for_bias

__all__ = ["add", "centred", "fma", "layer", "mean_over_space", "multiply", "plain", "product"]


def layer(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    reads: ActivationQuantizer | DynamicQuantizer,
    weight: WeightQuantizer,
    writes: ActivationQuantizer | None,
) -> Tensor | None:
    """A convolution or linear layer of any rank.

    Args:
        func: ``F.conv2d``, ``F.linear`` …, to be called as ``func(*args, **kwargs)``.
        args: input (already rounded), weight (not rounded), perhaps bias and more.
        kwargs: the rest.
        reads: what rounded the input.
        weight: what is to round the weight.
        writes: what will round the output, perhaps behind an activation function; ``None``
            if it stays in float.

    Returns:
        Multiples of the output's scale, not yet clipped to its range; floats without
        ``writes``; ``None`` for shapes and types that it does not cover.
    """
    given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    x, raw, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if not plain(x, raw):
        return None
    form, scale = weight.form, weight.refresh(raw)
    integers = quantized_integers(
        raw, scale, weight.zero_point, qmin=form.qmin, qmax=form.qmax, axis=weight.axis
    )
    if not form.symmetric:
        integers -= along(weight.zero_point, raw, weight.axis)
    flat = func is not F.linear or x.dim() == 2 or bias is None
    in_float = isinstance(reads, DynamicQuantizer) or not flat  # the bias is added in float
    shared = bias is not None and scale.dim() == 1 and len(scale) != len(bias)
    if bias is not None and not in_float and not shared:
        wide = room_for_bias(scale, bias, reads.scale)
        if bool((wide > scale).any()):
            if weight.axis != 0:
                return None  # as in the file, it stays in float
            ratio = (scale.double() / wide).reshape(-1, *[1] * (integers.dim() - 1))
            integers, scale = integers.double().mul_(ratio).round_(), wide
    total: Tensor = func(centred(x, reads), integers.float(), None, *args[3:], **given)
    if total.device.type != "cpu":  # Winograd and the like on a GPU: off by far less than 0.5
        total = total.round()
    channels = (-1,) if func is F.linear else (-1, *[1] * (total.dim() - 2))
    if scale.dim() and len(scale) != total.shape[-len(channels)]:
        return None  # groups of a transposed convolution that share scales
    step = reads.scale * scale
    if in_float:
        step = step.reshape(channels) if step.dim() else step
        total = total.mul_(step)
        return total if bias is None else total.add_(bias.reshape(channels))
    if bias is not None:
        whole = _whole_bias(bias, step, short=weight.compact and writes is not None)
        total = total.add_(whole.reshape(channels))
    step = step.reshape(channels) if step.dim() else step
    if writes is None:
        return total.mul_(step)
    return total.mul_(step / writes.scale).round_().mul_(writes.scale)


def add(
    func: Callable[..., Any],  # noqa: ARG001 - one signature for all
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    reads: tuple[ActivationQuantizer, ActivationQuantizer],
    writes: ActivationQuantizer,
) -> Tensor | None:
    """The sum of two rounded tensors as multiples of the output's scale.

    With levels a, b and ratios α = s_a / s_c, β = s_b / s_c it is
    ``round(fma(a, α, fma(b, β, z_c − fma(α, z_a, β z_b))))``.

    Args:
        func: an addition.
        args: the two tensors.
        kwargs: must be empty.
        reads: what rounded them.
        writes: what will round the sum.
    """
    if kwargs or len(args) != 2 or not plain(*args):
        return None
    first, second = reads
    ratio_a, ratio_b = first.scale / writes.scale, second.scale / writes.scale
    z_a, z_b, z_c = (q.zero_point.float() for q in (first, second, writes))
    fixed = z_c - fma(ratio_a, z_a, ratio_b * z_b)
    inner = fma(centred(args[1], second).add_(z_b), ratio_b, fixed)
    total = fma(centred(args[0], first).add_(z_a), ratio_a, inner)
    return total.round_().sub_(z_c).mul_(writes.scale)


def multiply(
    func: Callable[..., Any],  # noqa: ARG001 - one signature for all
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    reads: tuple[ActivationQuantizer, ActivationQuantizer],
    writes: ActivationQuantizer,
) -> Tensor | None:
    """The product of two rounded tensors, element by element, as multiples of the output's scale.

    Args:
        func: a multiplication.
        args: the two tensors, of shapes that broadcast.
        kwargs: must be empty.
        reads: what rounded them.
        writes: what will round the product.
    """
    if kwargs or len(args) != 2 or not plain(*args):
        return None
    first, second = reads
    whole = centred(args[0], first) * centred(args[1], second)
    return whole.mul_(first.scale * second.scale / writes.scale).round_().mul_(writes.scale)


def product(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    reads: tuple[ActivationQuantizer, ActivationQuantizer],
    writes: ActivationQuantizer | None,
) -> Tensor | None:
    """The matrix product of two rounded tensors.

    Args:
        func: ``torch.matmul`` or ``torch.bmm``.
        args: the two tensors, (…, M, K) and (…, K, N).
        kwargs: must be empty.
        reads: what rounded them.
        writes: what will round the product; ``None`` if it stays in float.
    """
    if kwargs or len(args) != 2 or not plain(*args):
        return None
    first, second = reads
    # In float64: 255 · 255 · K is beyond the whole numbers of float32 for K > 258.
    left, right = (centred(x, q).double() for x, q in zip(args, reads, strict=True))
    total: Tensor = func(left, right).float()
    step = first.scale * second.scale
    if writes is None:
        return total.mul_(step)
    return total.mul_(step / writes.scale).round_().mul_(writes.scale)


def mean_over_space(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    reads: ActivationQuantizer,
    writes: ActivationQuantizer,
) -> Tensor | None:
    """The mean over (H, W) of a rounded (N, C, H, W) tensor.

    Args:
        func: a mean or an adaptive average pooling to one pixel.
        args: the tensor and the options of ``func``.
        kwargs: the rest.
        reads: what rounded the tensor.
        writes: what will round the mean.
    """
    x = args[0] if args else None
    if x is None or not plain(x):
        return None
    shape = func(*args, **kwargs).shape
    if shape.numel() != x.shape[0] * x.shape[1]:
        return None
    factor = reads.scale / (writes.scale * float(x.shape[2] * x.shape[3]))
    total = centred(x, reads).sum((2, 3))
    return total.mul_(factor).round_().mul_(writes.scale).reshape(shape)


def _whole_bias(bias: Tensor, step: Tensor, *, short: bool) -> Tensor:
    """Multiples of ``step``, made here in float64, or by the runtime in float32 if ``short``."""
    if short and fits_half(bias):
        whole = bias.half().float() / step
    else:
        whole = bias.double() / step.double()
    return whole.round().clamp(-(2.0**31), 2.0**31 - 1).float()


def plain(*tensors: Any) -> bool:
    """Whether these are float32 tensors, and will not be shortened on the way."""
    return all(
        isinstance(tensor, Tensor)
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled(tensor.device.type)
        for tensor in tensors
    )


def centred(x: Tensor, quantizer: ActivationQuantizer | DynamicQuantizer) -> Tensor:
    """Integers minus zero point of a rounded tensor, as float32 (a new tensor)."""
    return torch.div(x, quantizer.scale).round_()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a · b + c`` with one rounding: exact in float64 for short a, then float32."""
    return (a.double() * b.double()).add_(c.double()).float()
