"""Fixed weights: a grid of levels and steps that a method chose, and weights that lie on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.quantize.quantizers.fixed import WeightQuantizer
from slimkit.quantize.scales import along, mse_weight_grid, weight_grid
from slimkit.quantize.specs import QuantizerSpec, named_weights
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["Grid", "ScaleChoice", "check", "choose_grid", "fix", "weight_of"]

ScaleChoice = Literal["mse", "max"]
"""``"max"``: the largest weight gets the largest level; ``"mse"``: smallest squared error."""


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a layer may have: integers, here called levels, times steps.

    Levels are counted from zero, so that a zero point shows in the smallest and the largest one.

    Attributes:
        scale: of the quantizer, shape (channels,), () or (channels, blocks).
        zero_point: int32, of the same shape.
        steps: the scale of every weight, of the weight's shape.
        lowest: the smallest level of every weight.
        highest: the largest.
    """

    scale: Tensor
    zero_point: Tensor
    steps: Tensor
    lowest: Tensor
    highest: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        """The levels of ``weight``, integers as float32."""
        exact = torch.div(weight, self.steps).round_()
        return exact.maximum(self.lowest).minimum(self.highest)


def choose_grid(
    weight: Tensor, spec: QuantizerSpec, choice: ScaleChoice, importance: Tensor | None = None
) -> Grid:
    """A grid for ``weight``.

    Args:
        weight: float.
        spec: of its quantizer.
        choice: how.
        importance: of the weights for the squared error; broadcasts to ``weight``.
    """
    axis = None if spec.channels is None else spec.axis
    given = (weight, spec.form, axis)
    if choice == "max":
        scale, zero_point = weight_grid(
            *given, pairs=spec.pairs, blocks=spec.blocks, compact=spec.compact
        )
    else:
        scale, zero_point = mse_weight_grid(
            *given,
            pairs=spec.pairs,
            blocks=spec.blocks,
            compact=spec.compact,
            importance=importance,
        )

    def spread(values: Tensor) -> Tensor:
        if spec.blocks is None:
            return along(values, weight, axis).expand_as(weight)
        wide = values.repeat_interleave(weight.shape[1] // spec.blocks, 1)
        return wide.reshape(*wide.shape, *[1] * (weight.dim() - 2)).expand_as(weight)

    zero = spread(zero_point).to(weight.dtype)
    lowest, highest = spec.form.qmin - zero, spec.form.qmax - zero
    return Grid(scale, zero_point, spread(scale), lowest, highest)


def weight_of(quantized: QuantizedModel, spec: QuantizerSpec) -> Tensor:
    """The weight that a quantizer rounds, as it is now; without gradient."""
    if spec.parameter is None:
        raise InputError("it does not round a weight", where=spec.name)
    return named_weights(quantized.model)[spec.parameter].detach()


@torch.no_grad()
def fix(quantized: QuantizedModel, spec: QuantizerSpec, levels: Tensor, grid: Grid) -> None:
    """Give a weight its levels, in place and in the plan.

    The weight becomes ``levels · steps`` and the grid stays from now on: rounding to nearest
    gives the same levels again, wherever the weight is saved, loaded or exported.

    Args:
        quantized: changed in place.
        spec: of the weight's quantizer; in the plan of ``quantized``.
        levels: integers on the grid, of the weight's shape.
        grid: from :func:`choose_grid`.
    """
    quantizer = quantized.quantizers[spec.name]
    if not isinstance(quantizer, WeightQuantizer):
        raise InputError("it does not round a weight", where=spec.name)
    weight_of(quantized, spec).copy_(levels * grid.steps)
    quantizer.scale.copy_(grid.scale)
    quantizer.zero_point.copy_(grid.zero_point)
    quantizer.fixed = True
    plan = quantized.plan
    specs = (replace(s, scale="fixed") if s.name == spec.name else s for s in plan.quantizers)
    quantized.replace_plan(replace(plan, quantizers=tuple(specs)))


def check(
    *, choice: str | None = None, counts: dict[str, float], shares: dict[str, float] | None = None
) -> None:
    """Refuse settings that make no sense.

    Args:
        choice: ``scale`` of a method.
        counts: name → value that must be > 0.
        shares: name → value that must lie in [0, 1].

    Raises:
        InputError: names the field.
    """
    if choice not in (None, "mse", "max"):
        raise InputError(f"unknown choice {choice!r}", where="scale", hint="mse or max")
    for name, value in counts.items():
        if not value > 0:
            raise InputError(f"{value} is not > 0", where=name)
    for name, value in (shares or {}).items():
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{value} is not in [0, 1]", where=name)
