"""GPTQ: weights are rounded one input after the other, the rest makes up for the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimkit.progress import ProgressDisplay
from slimkit.quantize.fixed_weights import (
    ScaleChoice,
    check,
    choose_scale,
    fix,
    steps_of,
    weight_of,
)
from slimkit.quantize.layer_calls import grouped
from slimkit.quantize.methods import Work
from slimkit.quantize.sampled_layers import (
    Samples,
    answers,
    centre,
    compensation,
    hessian,
    importance,
    keep_mean,
)
from slimkit.quantize.scales import pairs_can_overflow
from slimkit.quantize.scheme import QuantizerSpec
from slimkit.quantize.streams import Layer, Streams
from slimkit.runtime.fake_quantize import on_grid

__all__ = ["GPTQ", "compensated_levels"]

_PLENTY = 8
"""Positions for each input of an output, from which on they are taken to stand for all others."""
_SEEN = 0.75
"""Of fewer, the share that levels are tried by, to be judged on the others."""
_FINE, _POWERS = 16, range(-4, 4)
"""Scales to choose from: powers of 2^(1/16), times the one of the smallest squared error."""
_MOST_ELEMENTS = 1 << 24
"""Of a weight times the scales that are tried at once: 128 MiB in float64."""
_COLUMNS = 128
"""Columns whose corrections reach the rest of the weight in one product (section 3.3, step 2)."""


@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding of convolutions and linear layers, without gradient descent.

    Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (https://arxiv.org/abs/2210.17323). The Hessian ``2 X Xᵀ`` comes from what
    reaches the layer in the quantized network; a convolution is a matrix product with patches, a
    grouped or depthwise one a product for every group. Layers whose weights are fixed already stay
    as they are. Where pairs of 8-bit products must stay within 16 bits, weights go to one of their
    two neighbouring levels. A layer for whose many inputs the images are too few, so that what
    suits most of them does not suit the others, is rounded to nearest.

    Attributes:
        images: calibration examples to sample positions from.
        positions: samples of a layer, from all images together.
        damping: added to the diagonal of the Hessian, as a fraction of its mean.
        act_order: begin with the inputs that matter most, instead of in order.
        scale: of the weights, ``"mse"`` or ``"max"``; see AdaRound.
        compensate: first change the float weight so that it makes up for the errors of its inputs
            (:func:`~slimkit.quantize.sampled_layers.compensation`), and correct the bias.
        widest: layers whose sums have more inputs are rounded to nearest: the Hessian of so many
            inputs takes half a gigabyte, and its inversion minutes.
        seed: of the samples.

    Raises:
        InputError: a value is not valid.
    """

    when: ClassVar[Literal["before", "after"]] = "after"

    images: int = 256
    positions: int = 8192
    damping: float = 0.1
    act_order: bool = False
    scale: ScaleChoice = "mse"
    compensate: bool = True
    widest: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("images", "positions", "damping", "widest")
        check(choice=self.scale, counts={name: getattr(self, name) for name in names})

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.Method`."""
        streams = Streams(work, self.images)
        layers = [layer for layer in streams.layers if layer.weight.scale == "follows"]
        with ProgressDisplay(len(layers), 0, label="gptq", enabled=work.progress) as display:
            for number, layer in enumerate(layers, start=1):
                display.step(number, self._round(work, streams, layer))

    def _round(self, work: Work, streams: Streams, layer: Layer) -> str:
        if weight_of(work.quantized, layer.weight)[0].numel() > self.widest:
            return f"{layer.module} is too wide"
        generator = torch.Generator().manual_seed(self.seed)
        samples = streams.draw(layer, self.positions, generator)
        if samples is None:
            return f"{layer.module} never ran"
        spec = layer.weight
        original = weight = weight_of(work.quantized, spec).float().clone()
        still = weight == 0
        if self.compensate:
            weight = original + compensation(samples, original)
        scale = choose_scale(weight, spec, self.scale, importance(samples, weight))
        problem = _Problem(weight, spec, still, self.damping, self.act_order)
        levels, found = problem.nearest(scale), ""
        before = after = problem.error(problem.rounded(levels, scale), samples)
        scales = self._scales(scale, problem)
        if _suits_others(
            samples,
            lambda seen: problem.rounded(*problem.solved(scales, seen)),
            problem.error,
            problem.rounded(levels, scale),
        ):
            solution = problem.solved(scales, samples)
            after = problem.error(problem.rounded(*solution), samples)
            if after < before:
                levels, scale = solution
        else:
            found = ", rounded to nearest: too few images"
        fix(work.quantized, spec, levels, scale)
        if self.compensate:
            centre(samples, original)
            keep_mean(samples, original, weight_of(work.quantized, spec))
        return f"{layer.module}: error {before:.3g} → {min(before, after):.3g}{found}"

    def _scales(self, scale: Tensor, problem: _Problem) -> list[Tensor]:
        """That scale and some around it, if they may be others."""
        if self.scale == "max" or problem.pairs:
            return [scale]
        others = [scale * 2.0 ** (power / _FINE) for power in _POWERS]
        if problem.compact:
            return [on_grid(other / 2.0 ** (0.5 / _FINE)) for other in others]
        return others


class _Problem:
    """A weight that is to be rounded.

    Args:
        weight: float, output channels first.
        spec: of its quantizer.
        still: where it has to stay 0.
        damping: see :class:`GPTQ`.
        act_order: likewise.

    Attributes:
        pairs: whether pairs of products might overflow with other levels than the two next ones.
        compact: whether scales lie on a grid.
    """

    def __init__(
        self, weight: Tensor, spec: QuantizerSpec, still: Tensor, damping: float, act_order: bool
    ) -> None:
        self._weight, self._spec, self._still = weight, spec, still
        self._damping, self._act_order = damping, act_order
        self.pairs = spec.pairs and pairs_can_overflow(spec.form)
        self.compact = spec.compact

    def nearest(self, scale: Tensor) -> Tensor:
        """The levels next to the float weight."""
        exact = self._weight / steps_of(scale, self._weight, self._spec)
        return exact.round().clamp(self._spec.form.qmin, self._spec.form.qmax)

    def rounded(self, levels: Tensor, scale: Tensor) -> Tensor:
        """The weight with these levels."""
        return levels * steps_of(scale, levels, self._spec)

    def error(self, rounded: Tensor, seen: Samples) -> float:
        """The mean squared change of the output, summed over channels."""
        change = answers(seen, rounded - self._weight, slice(None), bias=False)
        return float(change.square().sum(1).mean())

    def solved(self, scales: list[Tensor], seen: Samples) -> tuple[Tensor, Tensor]:
        """Levels that make up for each other's errors, and of ``scales`` the best.

        Every output channel takes the scale whose levels have the smallest error; with one scale
        in all, and where they have the same, the whole weight does.
        """
        groups = len(seen.inputs)
        matrix = hessian(seen.inputs, self._damping)
        found: list[Tensor] = []
        errors: list[Tensor] = []
        for some in _chunks(scales, self._weight.numel()):
            rows = [self._rows(scale, groups) for scale in some]
            weight, steps, lowest, highest = (
                torch.cat(part, 1) for part in zip(*rows, strict=True)
            )
            levels = compensated_levels(
                weight, steps, lowest, highest, matrix, act_order=self._act_order
            )
            change = (levels * steps - weight).double()
            costs = ((change @ matrix) * change).sum(2)
            found += levels.chunk(len(some), 1)
            errors += costs.chunk(len(some), 1)
        cost = torch.stack([e.flatten() for e in errors])  # (scales, out)
        if self._spec.channels is None:
            cost = cost.sum(1, keepdim=True).expand_as(cost)
        best = cost.argmin(0)
        rows_of = torch.stack([levels.reshape(len(best), -1) for levels in found])
        chosen = rows_of[best, torch.arange(len(best), device=best.device)]
        if self._spec.channels is None:
            return chosen.reshape(self._weight.shape), scales[int(best[0])]
        several = torch.stack(scales)
        scale = several[best, torch.arange(len(best), device=best.device)]
        return chosen.reshape(self._weight.shape), scale

    def _rows(self, scale: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, steps, lowest and highest levels, each (groups, out / groups, K)."""
        weight, form = self._weight, self._spec.form
        steps = steps_of(scale, weight, self._spec).expand_as(weight)
        lowest = torch.full_like(weight, form.qmin)
        highest = torch.full_like(weight, form.qmax)
        if self.pairs:
            exact = weight / steps
            lowest = exact.floor().clamp(form.qmin, form.qmax)
            highest = exact.ceil().clamp(form.qmin, form.qmax)
        lowest, highest = (limit.masked_fill(self._still, 0.0) for limit in (lowest, highest))
        weight, steps, lowest, highest = (
            grouped(part, groups) for part in (weight, steps, lowest, highest)
        )
        return weight, steps, lowest, highest


def _chunks(scales: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """As many at once as memory allows: with each comes a copy of the weight of that size."""
    count = max(1, _MOST_ELEMENTS // size)
    for start in range(0, len(scales), count):
        yield scales[start : start + count]


def _suits_others(
    samples: Samples,
    rounded: Callable[[Samples], Tensor],
    error: Callable[[Tensor, Samples], float],
    nearest: Tensor,
) -> bool:
    """Whether what most of the images give is better than the nearest levels on the other images.

    It moves errors to where the images have nothing, and few images have nothing in many places
    where others have something. With many positions for every input there is no doubt.

    Args:
        samples: of the layer.
        rounded: images → weight.
        error: of a weight on images.
        nearest: the weight rounded to nearest.
    """
    _, positions, inputs = samples.inputs.shape
    if positions >= _PLENTY * inputs:
        return True
    seen, others = samples.divided(_SEEN)
    if not seen.inputs.shape[1] or not others.inputs.shape[1]:
        return False
    return error(rounded(seen), others) < error(nearest, others)


def compensated_levels(
    weight: Tensor,
    steps: Tensor,
    lowest: Tensor,
    highest: Tensor,
    hessian: Tensor,
    *,
    act_order: bool,
) -> Tensor:
    """Levels for which ``Σ (levels · steps − weight) H (…)ᵀ`` is small.

    Column after column is rounded, and what is left of the weight moves so that the output
    changes least (equations 2 and 3, by the Cholesky factor of the inverse Hessian, algorithm 1).

    Args:
        weight: (groups, out / groups, K).
        steps: the scale of every weight, of the same shape: one per channel repeats along the
            last dimension; one per group of inputs would change along it.
        lowest: the smallest level that each weight may get.
        highest: the largest.
        hessian: (groups, K, K), positive definite.
        act_order: begin with the largest diagonal entries.

    Returns:
        Integers as float32.
    """
    order = torch.arange(weight.shape[2], device=weight.device).expand(len(weight), -1)
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    columns = order.unsqueeze(1).expand_as(weight)
    ordered = [t.gather(2, columns) for t in (weight.double(), steps, lowest, highest)]
    rest, steps, lowest, highest = ordered
    square = order.unsqueeze(1).expand_as(hessian)
    hessian = hessian.gather(2, square).gather(1, square.transpose(1, 2))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    levels = torch.empty_like(rest)
    for start in range(0, rest.shape[2], _COLUMNS):
        end = min(start + _COLUMNS, rest.shape[2])
        errors = torch.empty_like(rest[:, :, start:end])
        for j in range(start, end):
            step = steps[:, :, j]
            level = torch.div(rest[:, :, j], step).round()
            levels[:, :, j] = level.maximum(lowest[:, :, j]).minimum(highest[:, :, j])
            error = (rest[:, :, j] - levels[:, :, j] * step) / factor[:, j, j].unsqueeze(1)
            errors[:, :, j - start] = error
            rest[:, :, j:end] -= error.unsqueeze(2) * factor[:, j, j:end].unsqueeze(1)
        rest[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(levels).scatter_(2, columns, levels).float()
