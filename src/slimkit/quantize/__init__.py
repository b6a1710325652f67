"""Quantization to 8-bit integers, after training (:func:`ptq`) or during it (:func:`qat`).

Quantizers are attached to the calls of a model by their address; the model itself is not
rewritten, stays trainable, and exports to ONNX in the form that the target runtime turns
into integer kernels.
"""

from __future__ import annotations

from slimkit.quantize.aware_training import qat
from slimkit.quantize.calibration import ptq
from slimkit.quantize.clipping import KL, MSE
from slimkit.quantize.methods import METHODS, Method
from slimkit.quantize.observers import (
    OBSERVERS,
    MeanOfMaxima,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.targets import TARGETS, NumberFormat, Target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = [
    "KL",
    "METHODS",
    "MSE",
    "OBSERVERS",
    "TARGETS",
    "MeanOfMaxima",
    "Method",
    "MinMax",
    "MovingAverage",
    "NumberFormat",
    "Observer",
    "Percentile",
    "QuantPlan",
    "QuantizedModel",
    "Target",
    "ptq",
    "qat",
]
