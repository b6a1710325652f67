"""What a layer computes, on a sample of the positions that it is applied at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from slimkit.quantize.layer_calls import grouped

__all__ = ["Samples", "answers", "centre", "compensation", "hessian", "importance"]

_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Dampings to choose from; see :func:`hessian`."""


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

    def divided(self, share: float) -> tuple[Samples, Samples]:
        """The first ``share`` of the positions, and the others, which are of later images."""
        end = int(share * self.inputs.shape[1])
        return (
            Samples(self.inputs[:, :end], self.targets[:end], self.bias),
            Samples(self.inputs[:, end:], self.targets[end:], self.bias),
        )


def answers(
    samples: Samples, weight: Tensor, picks: Tensor | slice, *, bias: bool = True
) -> Tensor:
    """What a layer with that weight answers at some of the positions, (P, out)."""
    inputs = samples.inputs[:, picks]
    product = inputs @ grouped(weight, len(inputs)).transpose(1, 2)
    output = product.transpose(0, 1).flatten(1)
    return output if samples.bias is None or not bias else output + samples.bias.detach()


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
    return _damped(_gram(inputs), damping)


def _gram(inputs: Tensor) -> Tensor:
    return (inputs.transpose(1, 2) @ inputs).double() * (2.0 / inputs.shape[1])


def _damped(gram: Tensor, damping: float) -> Tensor:
    """``gram``, changed in place."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal += torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return gram


def compensation(samples: Samples, weight: Tensor) -> Tensor:
    """The change of a float weight that makes up for what is wrong with its inputs.

    The least-squares solution of ``(W + Δ) X̂ = W X``, means left out, is what asymmetric
    calibration adds to a layer (Li et al., 2025, https://arxiv.org/abs/2504.02692, section 3). A
    few hundred images do not determine a large weight, so that it learns the noise of just these
    inputs: a ridge holds it back, chosen so that what the first half of the images gives suits the
    second half, and there is no change at all if none suits. Zeros stay zero.

    Args:
        samples: of the layer, in the order of the images.
        weight: float, output channels first.

    Returns:
        Of the shape of ``weight``.
    """
    residual = samples.targets - answers(samples, weight, slice(None))
    problem = _Ridge(samples.inputs, residual)
    half = samples.inputs.shape[1] // 2
    first, second = problem.part(slice(0, half)), problem.part(slice(half, None))
    errors = {ridge: second.error(first.solution(ridge)) for ridge in _RIDGES} if half else {}
    best = min(errors, key=lambda ridge: errors[ridge], default=None)
    if best is None or errors[best] >= second.error(None):
        return torch.zeros_like(weight)
    change = problem.solution(best).transpose(1, 2).reshape(weight.shape)
    return change.to(weight.dtype) * (weight != 0)


class _Ridge:
    """Least squares with a ridge: outputs are to change by ``residual``.

    Args:
        inputs: (groups, P, K).
        residual: (P, out).
    """

    def __init__(self, inputs: Tensor, residual: Tensor) -> None:
        self._inputs, self._residual = inputs, residual
        self._x = inputs - inputs.mean(1, keepdim=True)
        wanted = (residual - residual.mean(0)).reshape(len(residual), len(inputs), -1)
        self._y = wanted.transpose(0, 1)

    def part(self, positions: slice) -> _Ridge:
        """The problem at some of the positions."""
        return _Ridge(self._inputs[:, positions], self._residual[positions])

    def solution(self, ridge: float) -> Tensor:
        """(groups, K, out / groups)."""
        factor = torch.linalg.cholesky(_damped(self._products[0].clone(), ridge))
        return torch.cholesky_solve(self._products[1], factor).to(self._x.dtype)

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        """Of the inputs with themselves and with the residual."""
        right = (self._x.transpose(1, 2) @ self._y).double() * (2.0 / self._x.shape[1])
        return _gram(self._x), right

    def error(self, solution: Tensor | None) -> float:
        """What is left of the residual."""
        left = self._y if solution is None else self._y - self._x @ solution
        return float(left.square().mean())


def centre(samples: Samples, weight: Tensor) -> None:
    """Move the bias of the quantized network so that the mean of the outputs is right, in place.

    Args:
        samples: of the layer; nothing happens if it has no bias.
        weight: as it is now.
    """
    if isinstance(samples.bias, nn.Parameter):
        wrong = (samples.targets - answers(samples, weight, slice(None))).mean(0)
        samples.bias.data.add_(wrong)
