"""Which methods :func:`~slimkit.quantize.ptq` runs by default, by number format of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimkit.quantize.methods.bias_correction import BiasCorrection
from slimkit.quantize.methods.bias_tuning import BiasTuning
from slimkit.quantize.methods.gptq import GPTQ

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Method
    from slimkit.quantize.scheme import QuantPlan

__all__ = ["usual_methods"]

_FEW, _MANY, _MORE = 128, 192, 256
"""Calibration images that the default methods look at: of 8-bit weights, of fewer bits, and of bias
tuning. A few minutes for a small network on two cores. Few bits deserve more, and bias tuning
holds out a quarter, which no other method has seen then."""
_POSITIONS = 64
"""Positions of each image's feature map that GPTQ samples."""


def usual_methods(plan: QuantPlan) -> list[Method]:
    """What :func:`~slimkit.quantize.ptq` does when nobody says what to do.

    Weights that are rounded coarsely, with one scale per tensor or in fewer than 8 bits, make a
    network useless (EfficientNet-Lite0: ``python -m benchmarks.quantize_accuracy``) unless
    their errors are made up for; others do without.
    """
    weights = [spec for spec in plan.quantizers if spec.parameter is not None]
    if plan.granularity != "tensor" and all(spec.form.bits >= 8 for spec in weights):
        return []
    if all(spec.form.bits >= 8 for spec in weights):
        return [GPTQ(images=_FEW, positions=_POSITIONS * _FEW), BiasCorrection(images=_FEW)]
    return [
        GPTQ(images=_MANY, positions=_POSITIONS * _MANY, behind_activation=True),
        BiasCorrection(images=_MANY),
        BiasTuning(images=_MORE),
    ]
