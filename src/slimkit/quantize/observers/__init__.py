"""Observers: the range of values that a tensor has over many batches."""

from __future__ import annotations

from slimkit.quantize.observers.clipping import KL, MSE
from slimkit.quantize.observers.ranges import (
    OBSERVERS,
    MeanOfMaxima,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
)

__all__ = [
    "KL",
    "MSE",
    "OBSERVERS",
    "MeanOfMaxima",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
]
