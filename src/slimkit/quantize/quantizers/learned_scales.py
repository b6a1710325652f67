"""Rounding whose scale is a trained parameter: LSQ, LSQ+ and PACT as one fused function each.

With integers ``q = clamp(round(x / s) + z, qmin, qmax)`` and values ``y = (q − z) · s``, rounding
passed straight through, the gradients are

* for x: 1 inside, that is where ``qmin < x / s + z < qmax``, else 0;
* for the step size s, offset β = −z · s held: ``round(x / s) − x / s`` inside, ``qmin`` and
  ``qmax`` outside (LSQ: Esser et al., 2020, https://arxiv.org/abs/1902.08153, equations 3 and 5);
* for the offset β: 0 inside, 1 outside (LSQ+: Bhalgat et al., 2020,
  https://arxiv.org/abs/2004.09576, section 3.1);
* for a clip α = qmax · s on values ≥ 0: 1 where ``x ≥ α``, else 0 (PACT: Choi et al., 2018,
  https://arxiv.org/abs/1805.06085, equation 3).

Written out with a dozen element-wise operators that costs more than the convolution beside it.
But where nothing is clipped ``round(x / s) · s`` is y and where something is, y is constant, so
that, with h the gradient for x and g that for y, two inner products say it all::

    ∂L/∂s = (⟨g, y⟩ − ⟨h, x⟩) / s + z · ∂L/∂β        ∂L/∂β = Σ g − Σ h

and ``∂L/∂α = (⟨g, y⟩ − ⟨h, y⟩) / α``. Layers around keep x and y for their own backward, so this
takes no memory either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradient_scale", "round_channels", "round_clipped", "round_tensor"]


def gradient_scale(count: int, levels: int) -> float:
    """What LSQ multiplies the gradient of a step size by, ``1 / sqrt(N · Qp)``.

    It makes the updates of a step size about as large, relative to it, as those of the weights
    (Esser et al., 2020, section 2.2).

    Args:
        count: N, the weights that share the step size, or the features of one example.
        levels: Qp, the number of positive levels.
    """
    return 1.0 / math.sqrt(max(1, count) * levels)


def round_tensor(
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    *,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    factor: float,
) -> Tensor:
    """``x`` rounded with one scale in all; the gradients are LSQ's and LSQ+'s.

    Args:
        x: any shape; float32, or a shorter type that is computed in float32.
        step: the parameter behind ``scale``, shape (); gets ``factor`` · ∂L/∂s.
        offset: the parameter behind ``zero_point``, shape (); gets ``factor`` · ∂L/∂β. ``None``
            if the zero point is fixed.
        scale: step width to round with, > 0; may change before backward.
        zero_point: int32, likewise.
        qmin: smallest integer.
        qmax: largest integer.
        factor: see :func:`gradient_scale`.
    """
    result: Tensor = _RoundTensor.apply(
        x, step, offset, scale.detach(), zero_point, qmin, qmax, factor
    )
    return result


def round_channels(
    weight: Tensor,
    step: Tensor,
    *,
    scale: Tensor,
    axis: int,
    low: Tensor | int,
    high: Tensor | int,
    factor: float,
) -> Tensor:
    """``weight`` rounded with one scale per channel; the gradients are LSQ's.

    Args:
        weight: float32, or a shorter type that is computed in float32.
        step: the parameter behind ``scale``, shape (weight.shape[axis],).
        scale: step widths to round with, > 0.
        axis: dimension of the channels.
        low: smallest integer minus zero point, of all channels or of each.
        high: largest integer minus zero point, likewise.
        factor: see :func:`gradient_scale`.
    """
    result: Tensor = _RoundChannels.apply(weight, step, scale.detach(), axis, low, high, factor)
    return result


def round_clipped(x: Tensor, clip: Tensor, *, scale: Tensor, qmax: int) -> Tensor:
    """``x`` clipped to [0, clip] and rounded to 0 … qmax; the gradients are PACT's.

    Args:
        x: values behind a ReLU, any shape.
        clip: the parameter α, shape ().
        scale: α / qmax, > 0.
        qmax: largest integer.
    """
    result: Tensor = _RoundClipped.apply(x, clip, scale.detach(), qmax)
    return result


class _RoundTensor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _step: Tensor,
        offset: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        factor: float,
    ) -> Tensor:
        low, high = qmin - zero_point, qmax - zero_point
        y = _multiples(x, scale, low, high).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, scale.clone(), low * scale, high * scale, zero_point.clone())
        ctx.output = _Output(y)
        ctx.factor, ctx.learns_offset = factor, offset is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high, zero_point = ctx.saved_tensors
        grad, y = grads[0], ctx.output.value
        if y is None:
            y = torch.div(x, scale).round_().mul_(scale).clamp_(low, high)
        inner = _inside(grad, x, low, high)
        step = (_inner_product(grad, y) - _inner_product(inner, x)) / scale
        offset = None
        if ctx.learns_offset:
            outside = (grad.sum(dtype=torch.float32) - inner.sum(dtype=torch.float32)).to(step)
            step = step + zero_point * outside
            offset = outside * ctx.factor
        return inner, step * ctx.factor, offset, None, None, None, None, None


class _RoundChannels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        _step: Tensor,
        scale: Tensor,
        axis: int,
        low: Tensor | int,
        high: Tensor | int,
        factor: float,
    ) -> Tensor:
        shape = [1] * weight.dim()
        shape[axis] = -1
        scale = scale.reshape(shape).clone()
        low, high = (end.reshape(shape) if isinstance(end, Tensor) else end for end in (low, high))
        y = _multiples(weight, scale, low, high).mul_(scale).to(weight.dtype)
        ctx.save_for_backward(weight, y, scale)
        ctx.axis, ctx.ends, ctx.factor = axis, (low, high), factor
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, y, scale = ctx.saved_tensors
        levels = torch.div(weight, scale)
        inner = _inside(grads[0].to(levels.dtype), levels, *ctx.ends)
        others = [d for d in range(weight.dim()) if d != ctx.axis]
        whole = (grads[0] * y).sum(others, dtype=torch.float32) / scale.flatten()
        step = whole - levels.mul_(inner).sum(others, dtype=torch.float32)
        return inner.to(weight.dtype), step * ctx.factor, None, None, None, None, None


class _RoundClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _clip: Tensor, scale: Tensor, qmax: int) -> Tensor:
        y = _multiples(x, scale, 0, qmax).mul_(scale).to(x.dtype)
        ctx.save_for_backward(x, scale.clone(), qmax * scale)
        ctx.output = _Output(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, clip = ctx.saved_tensors
        y = ctx.output.value
        if y is None:
            y = torch.div(x, scale).round_().mul_(scale).clamp_(torch.zeros_like(clip), clip)
        inner = _inside(grads[0], x, torch.zeros_like(clip), clip)
        at_clip = (_inner_product(grads[0], y) - _inner_product(inner, y)) / clip
        return inner, at_clip, None, None


class _Output:
    """What a function returned, unless the network has changed it in place (``y += x``) since.

    ``save_for_backward`` would call that an error.
    """

    def __init__(self, y: Tensor) -> None:
        self._alias = y.detach()
        self._version = y._version

    @property
    def value(self) -> Tensor | None:
        """The tensor; ``None`` when it holds other values now."""
        return self._alias if self._alias._version == self._version else None


def _multiples(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Integers minus zero point, as float32."""
    levels = torch.div(x if x.dtype == torch.float32 else x.float(), scale).round_()
    if isinstance(low, Tensor) and low.device.type == "cpu" and low.dim() == 0:
        low, high = int(low), int(high)
    return levels.clamp_(low, high)  # type: ignore[arg-type]


def _inside(grad: Tensor, x: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """``grad`` where ``low < x < high``, else 0."""
    if isinstance(low, Tensor) and (low.device.type != "cpu" or low.dim()):
        return grad * ((x > low) & (x < high))
    # One fused pass; reading a number costs nothing on a CPU.
    inside: Tensor = torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    return inside


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Σ a · b in float32, without a tensor of products."""
    if b.dim() == 4 and b.is_contiguous(memory_format=torch.channels_last):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    return torch.dot(a.reshape(-1).float(), b.reshape(-1).float())
