"""One training loop for baselines, recovery after pruning, distillation and QAT."""

from __future__ import annotations

from slimkit.train.batch_norm import reestimate_batch_norm
from slimkit.train.callbacks import Callback, EpochContext, StepContext
from slimkit.train.ema import WeightAverage
from slimkit.train.history import History
from slimkit.train.settings import TrainSettings
from slimkit.train.stepping import StepTools
from slimkit.train.training import fit

__all__ = [
    "Callback",
    "EpochContext",
    "History",
    "StepContext",
    "StepTools",
    "TrainSettings",
    "WeightAverage",
    "fit",
    "reestimate_batch_norm",
]
