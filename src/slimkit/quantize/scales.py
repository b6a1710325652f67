"""From ranges to scales: the step width of the grid that a tensor is rounded to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkit.quantize.targets import NumberFormat
from slimkit.runtime.fake_quantize import on_grid

__all__ = [
    "affine_parameters",
    "along",
    "mse_weight_grid",
    "pair_scale",
    "pair_sums",
    "pairs_can_overflow",
    "weight_grid",
]

TINY = 1e-12
"""Smallest scale: 1 / scale and bias / scale stay finite in float32."""
_PAIR_LIMIT = 126
"""Largest sum of two neighbouring weights, in steps, before rounding: with both rounded up it stays
within 128, and 128 · 255 fits the 16 signed bits of VPMADDUBSW."""
_SMALLEST = 5.0
"""Factor by which a clipping scale may be smaller than the one that covers all weights: the search
for the least squared error ends there."""
_STEPS, _COMPACT_STEPS = 32, 16
"""Scales tried per factor of two, about 2 % apart; compact ones are the 16 powers of 2^(1/16)."""
_BELOW = 1 - 1e-4
"""Factor below 1 that a scale is multiplied by before it is rounded up to a power of 2^(1/16): one
that is such a power but for rounding errors stays it, and does not become the next."""
_ZERO_POINTS = 5
"""Zero points tried for a scale that clips, evenly from clipping only high values to only low."""


def affine_parameters(low: Tensor, high: Tensor, form: NumberFormat) -> tuple[Tensor, Tensor]:
    """Scale and zero point for values in [low, high].

    The range is widened to contain 0, which is represented exactly: zero padding costs no
    accuracy. A range of no width, as of a dead layer, gives scale 1.

    Args:
        low: smallest value to represent, shape (), finite.
        high: largest value, likewise.
        form: symmetric formats have zero point 0 (signed) and cover ±max(|low|, |high|).

    Returns:
        scale (float32, > 0) and zero point (int32), both of shape ().
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    zero = torch.zeros_like(low)
    if form.symmetric:
        scale = torch.maximum(-low, high) / form.qmax
    else:
        scale = (high - low) / (form.qmax - form.qmin)
    scale = torch.where(scale > 0, scale.clamp(min=TINY), torch.ones_like(scale))
    if form.symmetric:
        return scale, zero.to(torch.int32)
    return scale, _zero_point(form.qmin - low / scale, form)


def weight_grid(
    weight: Tensor,
    form: NumberFormat,
    axis: int | None,
    *,
    pairs: bool = False,
    blocks: int | None = None,
    compact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The finest grid that reaches the largest weights.

    Channels without weights (pruned or dead ones) get the scale of the largest channel, and
    no scale is more than 2^20 times smaller than that: the bias, whose step is the product of
    this scale and the input's, must fit into 32 bits.

    Args:
        weight: any shape, output channels first unless ``axis`` says otherwise.
        form: a symmetric format covers ±max |w|; another one from the smallest weight, or 0, to
            the largest.
        axis: dimension of the output channels; ``None`` for one scale in all.
        pairs: the runtime sums two products in 16 bits (:func:`pair_sums`): make the scale as
            much larger as it takes for no pair to overflow.
        blocks: of a weight (out, in …): so many scales for each output channel.
        compact: scales are powers of 2^(1/16), the next larger ones
            (:func:`~slimkit.runtime.fake_quantize.on_grid`).

    Returns:
        scale (float32, > 0) and zero point (int32), both of shape (weight.shape[axis],) or (), or
        (out, blocks).
    """
    values = weight.detach()
    if blocks is not None:
        rows = values.reshape(len(values) * blocks, -1)
        scale, zero_point = weight_grid(rows, form, 0, compact=compact)
        return scale.reshape(-1, blocks), zero_point.reshape(-1, blocks)
    low, high = _ends(values, axis)
    largest = torch.maximum(-low, high)
    scale = largest / form.qmax if form.symmetric else (high - low) / (form.qmax - form.qmin)
    if pairs and pairs_can_overflow(form):
        scale = torch.maximum(scale, pair_scale(values, axis))
    widest = scale.amax()
    widest = torch.where(widest > 0, widest.clamp(min=TINY), torch.ones_like(widest))
    floored = torch.maximum(scale, widest * 2.0**-20)
    scale = torch.where(scale > 0, floored, widest)
    scale = on_grid(scale) if compact else scale
    if form.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, _zero_point(form.qmin - low / scale, form)


def mse_weight_grid(
    weight: Tensor,
    form: NumberFormat,
    axis: int | None,
    *,
    pairs: bool = False,
    blocks: int | None = None,
    compact: bool = False,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The grid with the smallest squared rounding error; it may clip the largest weights.

    Scales are searched from a little above that of :func:`weight_grid` to a fifth of it; with each
    go several zero points, from the one that reaches the smallest weight to the one that reaches
    the largest. The fewer the bits, and the more weights share one scale, the more there is to win.

    Args:
        weight: see :func:`weight_grid`.
        form: likewise.
        axis: likewise.
        pairs: likewise; the scale does not fall below what keeps pairs from overflowing.
        blocks: likewise.
        compact: likewise; the best of these powers.
        importance: weighs the squared errors; broadcasts to ``weight``.

    Returns:
        As :func:`weight_grid`.
    """
    values = weight.detach().float()
    if blocks is not None:
        shape = (len(values) * blocks, -1)
        counts = None if importance is None else importance.reshape(shape)
        scale, zero_point = mse_weight_grid(
            values.reshape(shape), form, 0, compact=compact, importance=counts
        )
        return scale.reshape(-1, blocks), zero_point.reshape(-1, blocks)
    whole, best_zero = weight_grid(values, form, axis, pairs=pairs, compact=compact)
    lowest = torch.zeros_like(whole)
    if pairs and pairs_can_overflow(form):
        lowest = pair_scale(values, axis)
    others = [d for d in range(values.dim()) if d != axis]
    low, high = _ends(values, axis)
    best, smallest = whole, torch.full_like(whole, torch.inf)
    per_octave = _COMPACT_STEPS if compact else _STEPS
    narrower = range(int(per_octave * math.log2(_SMALLEST)) + 1)
    for number in (*narrower, *range(-per_octave // 8, 0)):
        scale = torch.maximum(whole * 2.0 ** (-number / per_octave), lowest)
        scale = on_grid(scale * _BELOW) if compact else scale
        steps = along(scale, values, axis)
        exact = torch.div(values, steps).round_()
        for zero_point in _zero_points(low / scale, high / scale, form):
            zero = along(zero_point, values, axis)
            levels = torch.clamp(exact, form.qmin - zero, form.qmax - zero)
            errors = levels.mul_(steps).sub_(values).square_()
            error = (errors if importance is None else errors.mul_(importance)).sum(others)
            better = error < smallest
            best = torch.where(better, scale, best)
            best_zero = torch.where(better, zero_point, best_zero)
            smallest = torch.minimum(error, smallest)
    return best, best_zero


def _zero_points(low: Tensor, high: Tensor, form: NumberFormat) -> list[Tensor]:
    """Zero points for weights from ``low`` ≤ 0 to ``high`` ≥ 0 steps, worth being tried."""
    if form.symmetric:
        return [torch.zeros_like(low, dtype=torch.int32)]
    first, last = form.qmin - low, form.qmax - high
    shares = (k / (_ZERO_POINTS - 1) for k in range(_ZERO_POINTS))
    return [_zero_point(first + share * (last - first), form) for share in shares]


def _zero_point(exact: Tensor, form: NumberFormat) -> Tensor:
    return exact.round().clamp(form.qmin, form.qmax).to(torch.int32)


def along(scale: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """``scale`` shaped so that it broadcasts to ``weight``."""
    if axis is None:
        return scale
    return scale.reshape([-1 if d == axis else 1 for d in range(weight.dim())])


def pairs_can_overflow(form: NumberFormat) -> bool:
    """Whether two weights of this format, times 255, may exceed 16 bits."""
    largest = form.qmax if form.symmetric else form.qmax - form.qmin
    return largest * 2 > _PAIR_LIMIT


def pair_scale(weight: Tensor, axis: int | None) -> Tensor:
    """The smallest scale of 8-bit weights at which no pair of products exceeds 16 bits.

    Args:
        weight: as for :func:`weight_grid`.
        axis: likewise.

    Returns:
        float32, ≥ 0, shape (weight.shape[axis],) or ().
    """
    sums = pair_sums(weight.detach(), axis or 0)
    low, high = _ends(sums, None if axis is None else 0)
    return torch.maximum(-low, high) / _PAIR_LIMIT


def _ends(values: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """The smallest value or 0, and the largest or 0."""
    dims = [d for d in range(values.dim()) if d != axis]
    return values.amin(dims).float().clamp(max=0.0), values.amax(dims).float().clamp(min=0.0)


def pair_sums(weight: Tensor, axis: int = 0) -> Tensor:
    """Sums of the weights whose products the x86 instruction VPMADDUBSW adds in 16 bits.

    It multiplies unsigned by signed bytes and adds neighbours with saturation at ±2^15, so
    255 · (w₁ + w₂) must stay below. Processors with a dot product (VNNI) sum in 32 bits
    instead. ONNX Runtime and oneDNN lay a filter out as (kernel positions, input channels) and
    take elements 2j and 2j+1 together; runtimes that fill up odd numbers of channels at each
    position pair them differently, so then every two neighbours count.

    Args:
        weight: (out, in, kernel …), or with output channels in dimension ``axis``.
        axis: of the output channels.

    Returns:
        (out, pairs), empty in the second dimension for a single weight.
    """
    weight = weight.movedim(axis, 0)
    channels = weight.shape[1] if weight.dim() > 1 else 1
    flat = (weight.movedim(1, -1) if weight.dim() > 2 else weight).reshape(len(weight), -1)
    if channels % 2:
        return flat[:, :-1] + flat[:, 1:] if flat.shape[1] > 1 else flat
    return flat[:, ::2] + flat[:, 1::2]
