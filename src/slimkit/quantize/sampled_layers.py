"""What a layer computes, on a sample of the positions that it is applied at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimkit.quantize.layer_calls import grouped

__all__ = ["Samples", "answers", "centre", "compensation", "hessian", "importance"]


@dataclass(frozen=True)
class Samples:
    """What reaches a layer at some positions of some images, and what it should answer.

    Attributes:
        inputs: of the quantized network, (groups, P, inputs of one output).
        targets: of the float network before the activation function, (P, out).
        bias: of the quantized network.
    """

    inputs: Tensor
    targets: Tensor
    bias: Tensor | None


def answers(
    samples: Samples, weight: Tensor, picks: Tensor | slice, *, bias: bool = True
) -> Tensor:
    """What a layer with that weight answers at some of the positions, (P, out)."""
    inputs = samples.inputs[:, picks]
    product = inputs @ grouped(weight, len(inputs)).transpose(1, 2)
    output = product.transpose(0, 1).flatten(1)
    return output if samples.bias is None or not bias else output + samples.bias


def importance(samples: Samples, weight: Tensor) -> Tensor:
    """How much the square of an error of each weight counts in the output: E[x²].

    Returns:
        Of the shape of ``weight``.
    """
    squares = samples.inputs.square().mean(1, keepdim=True)
    return squares.expand_as(grouped(weight, len(squares))).reshape(weight.shape)


def hessian(inputs: Tensor, damping: float) -> Tensor:
    """``2 X Xᵀ / P`` of every group, with damping; float64, (groups, K, K).

    Args:
        inputs: (groups, P, K).
        damping: fraction of the mean of the diagonal that is added to it.
    """
    product = (inputs.transpose(1, 2) @ inputs).double() * (2.0 / inputs.shape[1])
    diagonal = product.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return product


def compensation(samples: Samples, weight: Tensor, damping: float) -> Tensor:
    """The change of a float weight that makes up for what is wrong with its inputs.

    The least-squares solution of ``(W + Δ) X̂ = W X``, means left out, with ridge ``damping``; it
    is what asymmetric calibration adds to a layer (Li et al., 2025,
    https://arxiv.org/abs/2504.02692, section 3). Zeros stay zero.

    Args:
        samples: of the layer.
        weight: float, output channels first.
        damping: see :func:`hessian`.
    """
    residual = samples.targets - answers(samples, weight, slice(None))
    residual = residual - residual.mean(0)
    inputs = samples.inputs - samples.inputs.mean(1, keepdim=True)
    groups, count, _ = inputs.shape
    sides = residual.reshape(count, groups, -1).transpose(0, 1)
    right = (inputs.transpose(1, 2) @ sides).double() * (2.0 / count)
    change = torch.cholesky_solve(right, torch.linalg.cholesky(hessian(inputs, damping)))
    return change.transpose(1, 2).reshape(weight.shape).to(weight.dtype) * (weight != 0)


def centre(samples: Samples, weight: Tensor) -> None:
    """Move the bias of the quantized network so that the mean of the outputs is right, in place.

    Args:
        samples: of the layer; nothing happens if it has no bias.
        weight: as it is now.
    """
    if isinstance(samples.bias, nn.Parameter):
        wrong = (samples.targets - answers(samples, weight, slice(None))).mean(0)
        samples.bias.data.add_(wrong)
