"""Weights whose scale and levels a method has chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.quantize.quantizers import WeightQuantizer
from slimkit.quantize.scales import along, mse_weight_scale, weight_scale
from slimkit.quantize.scheme import QuantizerSpec, named_weights
from slimkit.quantize.wrapper import QuantizedModel
from slimkit.runtime.fake_quantize import on_grid

__all__ = ["ScaleChoice", "check", "choose_scale", "fix", "steps_of", "weight_of"]

ScaleChoice = Literal["mse", "max"]
"""``"max"``: the largest weight gets the largest level; ``"mse"``: smallest squared error."""


def choose_scale(
    weight: Tensor, spec: QuantizerSpec, choice: ScaleChoice, importance: Tensor | None = None
) -> Tensor:
    """A scale for ``weight``, shape (channels,), () or (channels, blocks).

    Args:
        weight: float.
        spec: of its quantizer.
        choice: how.
        importance: of the weights for the squared error; broadcasts to ``weight``.
    """
    if choice == "max":
        scale = weight_scale(weight, spec.form, _axis(spec), pairs=spec.pairs, blocks=spec.blocks)
    else:
        rows, counts = weight, importance
        if spec.blocks is not None:
            shape = (len(weight) * spec.blocks, -1)
            rows = weight.reshape(shape)
            counts = None if importance is None else importance.reshape(shape)
        scale = mse_weight_scale(rows, spec.form, _axis(spec), pairs=spec.pairs, importance=counts)
        scale = scale if spec.blocks is None else scale.reshape(-1, spec.blocks)
    return on_grid(scale) if spec.compact else scale


def steps_of(scale: Tensor, weight: Tensor, spec: QuantizerSpec) -> Tensor:
    """The scale of every weight: ``scale`` shaped so that it broadcasts to ``weight``."""
    if spec.blocks is None:
        return along(scale, weight, _axis(spec))
    wide = scale.repeat_interleave(weight.shape[1] // spec.blocks, 1)
    return wide.reshape(*wide.shape, *[1] * (weight.dim() - 2))


def weight_of(quantized: QuantizedModel, spec: QuantizerSpec) -> Tensor:
    """The weight that a quantizer rounds, as it is now; without gradient."""
    if spec.parameter is None:
        raise InputError("it does not round a weight", where=spec.name)
    return named_weights(quantized.model)[spec.parameter].detach()


def _axis(spec: QuantizerSpec) -> int | None:
    """The dimension with a scale each; ``None`` for one scale in all."""
    return None if spec.channels is None else spec.axis


@torch.no_grad()
def fix(quantized: QuantizedModel, spec: QuantizerSpec, levels: Tensor, scale: Tensor) -> None:
    """Give a weight its levels, in place and in the plan.

    The weight becomes ``levels · scale`` and the scale stays from now on: rounding to nearest
    gives the same levels again, wherever the weight is saved, loaded or exported.

    Args:
        quantized: changed in place.
        spec: of the weight's quantizer; in the plan of ``quantized``.
        levels: integers on the grid, of the weight's shape.
        scale: from :func:`choose_scale`.
    """
    quantizer = quantized.quantizers[spec.name]
    if not isinstance(quantizer, WeightQuantizer):
        raise InputError("it does not round a weight", where=spec.name)
    weight_of(quantized, spec).copy_(levels * steps_of(scale, levels, spec))
    quantizer.scale.copy_(scale)
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
