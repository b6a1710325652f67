"""GPTQ: second-order rounding, one column after the other; the rest makes up for the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimkit.quantize.methods.fixed_weights import (
    ScaleChoice,
    check,
    choose_grid,
    fix,
    weight_of,
)
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.layer_calls import grouped
from slimkit.quantize.methods.sampled_layers import (
    LayerSamples,
    answers,
    centre,
    compensation,
    hessian,
    importance,
    keep_mean,
    passed_on,
)
from slimkit.quantize.methods.streams import RoundedLayer, Streams
from slimkit.quantize.scales import pairs_can_overflow

__all__ = ["GPTQ", "compensated_levels"]

_PLENTY = 8
"""Sampled positions per input of an output (per unknown of the least-squares problem) from which on
the Hessian is trusted without a test on held-out images."""
_SEEN = 0.75
"""With fewer positions: the share that levels are computed from; the other quarter judges them."""
_NARROW = 384
"""Inputs of an output up to which ``behind_activation`` gives every output channel a Hessian of its
own: one more inversion per channel, whose time grows with the cube of this."""
_MOST_ELEMENTS = 1 << 25
"""float32 numbers of the weighted inputs of some output channels that are held at once: 128 MiB."""
_COLUMNS = 128
"""Columns per block whose corrections reach the rest of the weight in one matrix product: the
paper's lazy batch updates (section 3.3, step 2), and its size."""


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
            (:func:`~slimkit.quantize.methods.sampled_layers.compensation`), and correct the bias.
        behind_activation: errors count as far as the activation function behind the layer passes
            them on (:func:`~slimkit.quantize.methods.sampled_layers.passed_on`), as in AdaRound's
            equation 25. Every output channel then has a Hessian of its own, which takes longer;
            those of layers whose sums have more than 384 inputs do not.
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
    behind_activation: bool = False
    widest: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("images", "positions", "damping", "widest")
        check(choice=self.scale, counts={name: getattr(self, name) for name in names})

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.interface.Method`."""
        streams = Streams(work, self.images)
        layers = [layer for layer in streams.layers if layer.weight.scale == "follows"]
        with work.display(len(layers), "gptq") as display:
            for number, layer in enumerate(layers, start=1):
                display.step(number, self._round(work, streams, layer))

    def _round(self, work: Work, streams: Streams, layer: RoundedLayer) -> str:
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
        if self.behind_activation and weight[0].numel() <= _NARROW:
            samples = self._weighted(layer, samples, original)
        grid = choose_grid(weight, spec, self.scale, importance(samples, weight))
        steps, lowest, highest = grid.steps, grid.lowest, grid.highest
        nearest = grid.nearest(weight)
        if spec.pairs and pairs_can_overflow(spec.form):  # with others a pair might overflow
            exact = weight / steps
            lowest, highest = (
                end.maximum(lowest).minimum(highest) for end in (exact.floor(), exact.ceil())
            )
        lowest, highest = lowest.masked_fill(still, 0.0), highest.masked_fill(still, 0.0)

        def rounded(seen: LayerSamples) -> Tensor:
            found = []
            for rows, inputs in _alike(seen):
                levels = compensated_levels(
                    grouped(weight[rows], len(inputs)),
                    grouped(steps[rows], len(inputs)),
                    grouped(lowest[rows], len(inputs)),
                    grouped(highest[rows], len(inputs)),
                    hessian(inputs, self.damping),
                    act_order=self.act_order,
                )
                found.append(levels.flatten(0, 1))
            return torch.cat(found).reshape(weight.shape)

        def error(levels: Tensor, seen: LayerSamples) -> float:
            change = answers(seen, levels * steps - weight, slice(None), bias=False).square()
            return float((change if seen.passed is None else change * seen.passed).sum(1).mean())

        before = after = error(nearest, samples)
        levels, found = nearest, ""
        if _suits_others(samples, rounded, error, nearest):
            compensated = rounded(samples)
            after = error(compensated, samples)
            levels = compensated if after < before else nearest
        else:
            found = ", rounded to nearest: too few images"
        fix(work.quantized, spec, levels, grid)
        if self.compensate:
            centre(samples, original)
            keep_mean(samples, original, weight_of(work.quantized, spec))
        return f"{layer.module}: error {before:.3g} → {min(before, after):.3g}{found}"

    def _weighted(self, layer: RoundedLayer, samples: LayerSamples, weight: Tensor) -> LayerSamples:
        grid = choose_grid(weight, layer.weight, self.scale, importance(samples, weight))
        nearest = grid.nearest(weight) * grid.steps
        return replace(samples, passed=passed_on(samples, layer.activation, nearest))


def _alike(samples: LayerSamples) -> Iterator[tuple[slice, Tensor]]:
    """Output channels, and inputs to take the Hessian of: (groups, P, K).

    All channels of a group share one, unless an activation function passes on other errors of each.
    """
    if samples.passed is None:
        yield slice(None), samples.inputs
        return
    groups, positions, width = samples.inputs.shape
    channels = torch.arange(samples.passed.shape[1], device=samples.inputs.device)
    group = channels // (len(channels) // groups)
    size = max(1, _MOST_ELEMENTS // (positions * width))
    for start in range(0, len(channels), size):
        rows = slice(start, start + size)
        passed = samples.passed[:, rows].T.sqrt().unsqueeze(2)
        yield rows, samples.inputs[group[rows]] * passed


def _suits_others(
    samples: LayerSamples,
    rounded: Callable[[LayerSamples], Tensor],
    error: Callable[[Tensor, LayerSamples], float],
    nearest: Tensor,
) -> bool:
    """Whether levels by most of the images are better than the nearest ones on the other images.

    They move errors to where the images have nothing, and few images have nothing in many places
    where others have something. With many positions for every input there is no doubt.
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
