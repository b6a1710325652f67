"""Least squares of one layer, on a sample of the positions that its weight is applied at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from slimkit.quantize.methods.layer_calls import grouped

__all__ = [
    "LayerSamples",
    "answers",
    "centre",
    "compensation",
    "hessian",
    "importance",
    "keep_mean",
    "passed_on",
    "reliable_mean",
]

_RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Ridge penalties to choose from, as fractions of the mean of the Hessian's diagonal: half a decade
apart, from hardly any to one that leaves the weight as it is."""
_LEAST = 0.1
"""Smallest share of a squared error that :func:`passed_on` gives: a ReLU that is closed on these
images may be open on others, and a Hessian of zeros has no inverse."""
_OPEN = 1e-3
"""Largest deviation of all slopes from 1 for which there is no activation function to speak of."""
_SURE = 2.0
"""Standard errors of the mean by which a change must be better on held-out images to be made: about
95 % confidence."""


@dataclass(frozen=True)
class LayerSamples:
    """What reaches a layer at some positions of some images, and what it should answer.

    Attributes:
        inputs: of the quantized network, (groups, P, inputs of one output).
        targets: of the float network before the activation function, (P, out).
        bias: of the quantized network.
        examples: the number of the image that each position is of, (P,); ``None`` if each is of
            another one. What positions of one image say is alike.
        passed: how much of the square of an error counts, (P, out), see :func:`passed_on`;
            ``None`` if all of it does.
    """

    inputs: Tensor
    targets: Tensor
    bias: Tensor | None
    examples: Tensor | None = None
    passed: Tensor | None = None

    def divided(self, share: float) -> tuple[LayerSamples, LayerSamples]:
        """The first ``share`` of the positions, and the others, which are of later images."""
        end = int(share * self.inputs.shape[1])
        return self._part(slice(0, end)), self._part(slice(end, None))

    def by_example(self, values: Tensor) -> Tensor:
        """The mean of the positions of every image: (P, …) → (images, …)."""
        if self.examples is None:
            return values
        present, places = torch.unique(self.examples, return_inverse=True)
        sums = values.new_zeros(len(present), *values.shape[1:]).index_add_(0, places, values)
        counts = torch.bincount(places).to(values)
        return sums / counts.reshape(-1, *[1] * (values.dim() - 1))

    def _part(self, positions: slice) -> LayerSamples:
        return LayerSamples(
            self.inputs[:, positions],
            self.targets[positions],
            self.bias,
            None if self.examples is None else self.examples[positions],
            None if self.passed is None else self.passed[positions],
        )


def answers(
    samples: LayerSamples, weight: Tensor, picks: Tensor | slice, *, bias: bool = True
) -> Tensor:
    """What a layer with that weight answers at some of the positions, (P, out)."""
    inputs = samples.inputs[:, picks]
    product = inputs @ grouped(weight, len(inputs)).transpose(1, 2)
    output = product.transpose(0, 1).flatten(1)
    return output if samples.bias is None or not bias else output + samples.bias.detach()


def importance(samples: LayerSamples, weight: Tensor) -> Tensor:
    """How much the square of an error of each weight counts in the output: E[x²].

    Returns:
        Of the shape of ``weight``.
    """
    squares = samples.inputs.square()
    groups, positions, _ = squares.shape
    if samples.passed is None:
        mean = squares.mean(1, keepdim=True)
        return mean.expand_as(grouped(weight, groups)).reshape(weight.shape)
    passed = samples.passed.T.reshape(groups, -1, positions)
    return (passed @ squares / positions).reshape(weight.shape)


def passed_on(
    samples: LayerSamples, activation: Callable[[Tensor], Tensor], rounded: Tensor
) -> Tensor | None:
    """What the activation function behind a layer lets through of the square of an error.

    The squared slope around the output of the float network, over as much as the outputs of the
    channel are off with a weight that is rounded to nearest: 0 where a ReLU is closed whatever
    happens, 1 where it is open, something between near its bend.

    Args:
        samples: of the layer.
        activation: the function.
        rounded: the weight, rounded to nearest.

    Returns:
        (P, out), at least 0.1 so that no position counts for nothing; ``None`` if everything
        passes.
    """
    off = (samples.targets - answers(samples, rounded, slice(None))).square().mean(0).sqrt()
    least = 1e-3 * samples.targets.abs().amax(0)  # or the difference is lost in the sum
    reach = off.maximum(least).clamp(min=torch.finfo(off.dtype).tiny)
    above, below = activation(samples.targets + reach), activation(samples.targets - reach)
    slopes = ((above - below) / (2 * reach)).square()
    if bool((slopes - 1).abs().max() < _OPEN):
        return None
    return slopes.clamp(min=_LEAST)


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


def compensation(samples: LayerSamples, weight: Tensor) -> Tensor:
    """The change of a float weight that makes up for what is wrong with its inputs.

    The least-squares solution of ``(W + Δ) X̂ = W X``, means left out, is what asymmetric
    calibration adds to a layer (Li et al., 2025, https://arxiv.org/abs/2504.02692, section 3). A
    few hundred images do not determine a large weight, so that it learns the noise of just these
    inputs: a ridge holds it back, chosen so that what the first half of the images gives suits the
    second half, and there is no change at all unless that is better for the second half, image by
    image, than chance would make it. Zeros stay zero.

    Args:
        samples: of the layer, in the order of the images.
        weight: float, output channels first.

    Returns:
        Of the shape of ``weight``.
    """
    residual = samples.targets - answers(samples, weight, slice(None))
    problem = _Ridge(samples.inputs, residual)
    half = samples.inputs.shape[1] // 2
    none = torch.zeros_like(weight)
    if not half:
        return none
    first, second = problem.part(slice(0, half)), problem.part(slice(half, None))
    errors = {ridge: second.errors(first.solution(ridge)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: float(errors[ridge].mean()))
    _, judged = samples.divided(0.5)
    gain = judged.by_example(second.errors(None) - errors[best])
    if not bool(gain.mean() > _SURE * _uncertainty(gain)):
        return none
    change = problem.solution(best).transpose(1, 2).reshape(weight.shape)
    return change.to(weight.dtype) * (weight != 0)


def _uncertainty(values: Tensor) -> Tensor:
    """The standard error of the mean of ``values`` along the first dimension; 0 of one."""
    if len(values) < 2:
        return torch.zeros_like(values[0])
    return values.std(0) / math.sqrt(len(values))


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

    def errors(self, solution: Tensor | None) -> Tensor:
        """What is left of the residual at every position, (P,)."""
        left = self._y if solution is None else self._y - self._x @ solution
        return left.square().mean((0, 2))


def centre(samples: LayerSamples, weight: Tensor) -> None:
    """Move the bias of the quantized network so that the mean of the outputs is right, in place.

    As far as the images agree about it, see :func:`reliable_mean`.

    Args:
        samples: of the layer; nothing happens if it has no bias.
        weight: that the mean is to be right with; :func:`keep_mean` follows what changes it.
    """
    if isinstance(samples.bias, nn.Parameter):
        wrong = samples.targets - answers(samples, weight, slice(None))
        samples.bias.data.add_(reliable_mean(samples.by_example(wrong)))


def keep_mean(samples: LayerSamples, before: Tensor, after: Tensor) -> None:
    """Move the bias by what a change of the weight does to the mean of the outputs, in place.

    What the inputs' errors do to it is less certain, and :func:`centre`'s business.

    Args:
        samples: of the layer; nothing happens if it has no bias.
        before: the weight as it was.
        after: as it is now.
    """
    if isinstance(samples.bias, nn.Parameter):
        lost = answers(samples, before - after, slice(None), bias=False)
        samples.bias.data.add_(reliable_mean(samples.by_example(lost)))


def reliable_mean(values: Tensor) -> Tensor:
    """The mean over images, without what chance may have put into it.

    A mean of few images that differ is mostly chance, and a bias that is moved by it is wrong for
    all others. Of every channel's mean ``m`` with the standard error ``s`` the share
    ``max(0, 1 − s² / m²)`` is kept: the non-negative garrote (Breiman, 1995, "Better Subset
    Regression Using the Nonnegative Garrote"), with the error of a mean for its limit.

    Args:
        values: (images, channels); of a single image the mean is taken as it is.

    Returns:
        (channels).
    """
    mean = values.mean(0)
    square = mean.square()
    kept = (square - _uncertainty(values).square()).clamp_min(0.0)
    return mean * kept / square.clamp_min(torch.finfo(square.dtype).tiny)
