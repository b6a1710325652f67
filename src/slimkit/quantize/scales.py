"""From ranges to scales: the step width of the grid that a tensor is rounded to."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.quantize.targets import NumberFormat

__all__ = [
    "affine_parameters",
    "along",
    "mse_weight_scale",
    "pair_scale",
    "pair_sums",
    "pairs_can_overflow",
    "weight_scale",
]

TINY = 1e-12
"""No scale is smaller: 1 / scale and bias / scale stay finite."""
_PAIR_LIMIT = 126
"""Of the sum of two weights before rounding: with both rounded up, 128 · 255 fits 16 bits."""


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
    point = (form.qmin - low / scale).round().clamp(form.qmin, form.qmax)
    return scale, point.to(torch.int32)


def weight_scale(
    weight: Tensor,
    form: NumberFormat,
    axis: int | None,
    *,
    pairs: bool = False,
    blocks: int | None = None,
) -> Tensor:
    """The scale that maps the largest magnitude onto the largest integer.

    Channels without weights (pruned or dead ones) get the scale of the largest channel, and
    no scale is more than 2^20 times smaller than that: the bias, whose step is the product of
    this scale and the input's, must fit into 32 bits.

    Args:
        weight: any shape, output channels first unless ``axis`` says otherwise.
        form: a symmetric format.
        axis: dimension of the output channels; ``None`` for one scale in all.
        pairs: the runtime sums two products in 16 bits (:func:`pair_sums`): make the scale as
            much larger as it takes for no pair to overflow.
        blocks: of a weight (out, in …): so many scales for each output channel.

    Returns:
        float32, > 0, shape (weight.shape[axis],) or (), or (out, blocks).
    """
    values = weight.detach()
    if blocks is not None:
        rows = values.reshape(len(values) * blocks, -1)
        return weight_scale(rows, form, 0).reshape(-1, blocks)
    scale = _largest(values, axis) / form.qmax
    if pairs and pairs_can_overflow(form):
        scale = torch.maximum(scale, pair_scale(values, axis))
    largest = scale.amax()
    largest = torch.where(largest > 0, largest.clamp(min=TINY), torch.ones_like(largest))
    floored = torch.maximum(scale, largest * 2.0**-20)
    return torch.where(scale > 0, floored, largest)


def mse_weight_scale(
    weight: Tensor,
    form: NumberFormat,
    axis: int | None,
    *,
    pairs: bool = False,
    importance: Tensor | None = None,
    candidates: int = 80,
) -> Tensor:
    """The scale with the smallest squared rounding error; it may clip the largest weights.

    It is searched among fractions 0.2 … 1 of :func:`weight_scale`. The fewer the bits, and the
    more weights share one scale, the more there is to win.

    Args:
        weight: see :func:`weight_scale`.
        form: likewise.
        axis: likewise.
        pairs: likewise; the scale does not fall below what keeps pairs from overflowing.
        importance: weighs the squared errors; broadcasts to ``weight``.
        candidates: number of scales to try.

    Returns:
        As :func:`weight_scale`.
    """
    values = weight.detach().float()
    whole = weight_scale(values, form, axis, pairs=pairs)
    lowest = (
        pair_scale(values, axis) if pairs and pairs_can_overflow(form) else torch.zeros_like(whole)
    )
    others = [d for d in range(values.dim()) if d != axis]
    best, smallest = whole, torch.full_like(whole, torch.inf)
    for number in range(candidates):
        scale = torch.maximum(whole * (1.0 - 0.8 * number / candidates), lowest)
        steps = along(scale, values, axis)
        levels = torch.div(values, steps).round_().clamp_(form.qmin, form.qmax)
        errors = levels.mul_(steps).sub_(values).square_()
        error = (errors if importance is None else errors.mul_(importance)).sum(others)
        best = torch.where(error < smallest, scale, best)
        smallest = torch.minimum(error, smallest)
    return best


def along(scale: Tensor, weight: Tensor, axis: int | None) -> Tensor:
    """``scale`` shaped so that it broadcasts to ``weight``."""
    if axis is None:
        return scale
    return scale.reshape([-1 if d == axis else 1 for d in range(weight.dim())])


def pairs_can_overflow(form: NumberFormat) -> bool:
    """Whether two weights of this format, times 255, may exceed 16 bits."""
    return form.qmax * 2 > _PAIR_LIMIT


def pair_scale(weight: Tensor, axis: int | None) -> Tensor:
    """The smallest scale of 8-bit weights at which no pair of products exceeds 16 bits.

    Args:
        weight: as for :func:`weight_scale`.
        axis: likewise.

    Returns:
        float32, ≥ 0, shape (weight.shape[axis],) or ().
    """
    sums = pair_sums(weight.detach(), axis or 0)
    return _largest(sums, None if axis is None else 0) / _PAIR_LIMIT


def _largest(values: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude; without the copy that ``abs`` would make."""
    dims = [d for d in range(values.dim()) if d != axis]
    return torch.maximum(values.amax(dims), values.amin(dims).neg_()).float()


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
