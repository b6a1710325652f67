"""Quantization to 8-bit integers, after training (:func:`ptq`) or during it (:func:`qat`).

Quantizers are attached to the calls of a model by their address; the model itself is not
rewritten, stays trainable, and exports to ONNX in the form that the target runtime turns
into integer kernels.
"""

from __future__ import annotations

from slimkit.limits import Limit
from slimkit.quantize.aware_training import qat
from slimkit.quantize.bit_allocation import BitAllocation, mixed_precision
from slimkit.quantize.calibration import ptq
from slimkit.quantize.evaluating import EvaluationError
from slimkit.quantize.layer_choice.sensitivity_table import LayerSensitivity
from slimkit.quantize.methods.interface import METHODS, Method
from slimkit.quantize.observers.clipping import KL, MSE
from slimkit.quantize.observers.ranges import (
    OBSERVERS,
    MeanOfMaxima,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)
from slimkit.quantize.planning.requests import PerGroup
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.sensitivity_analysis import sensitivity
from slimkit.quantize.settings_search import SettingsSearch, search_settings
from slimkit.quantize.targets import TARGETS, NumberFormat, Target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = [
    "KL",
    "METHODS",
    "MSE",
    "OBSERVERS",
    "TARGETS",
    "BitAllocation",
    "EvaluationError",
    "LayerSensitivity",
    "Limit",
    "MeanOfMaxima",
    "Method",
    "MinMax",
    "MovingAverage",
    "NumberFormat",
    "Observer",
    "PerGroup",
    "Percentile",
    "QuantPlan",
    "QuantizedModel",
    "SettingsSearch",
    "Target",
    "mixed_precision",
    "ptq",
    "qat",
    "search_settings",
    "sensitivity",
]
