"""Output check: signal to quantization noise after `ptq`, and a warning where it is low."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from slimkit.errors import SlimkitError
from slimkit.inputs import Inputs
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.outputs.layer_noise import layer_noise
from slimkit.quantize.wrapper import QuantizedModel

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work

__all__ = ["ENOUGH_DB", "OutputCheck", "output_check"]

ENOUGH_DB = 15.0
"""dB of signal to quantization noise of the outputs below which a warning comes: classifiers then
lose more than a point of accuracy (EfficientNet-Lite0 in docs/benchmarks)."""
_EXAMPLES = 8
"""Examples that the float and the quantized network run on: little beside calibration."""
_EXAMINED = 1
"""Examples by which the noisiest layers are found: all their outputs are held in memory."""
_NAMED = 3
"""Layers that the warning names."""


class OutputCheck:
    """Remembers what the float network gives for a few examples, to compare with later.

    Networks without comparable outputs (no floating-point tensor, all zero, not finite, of other
    shapes once values change) are not judged, nor those that take batches of one size only.

    Args:
        quantized: calibrated, before anything adjusts weights to their rounding.
        batch: of calibration data, on the device of the network; its first examples are used.
    """

    def __init__(self, quantized: QuantizedModel, batch: Inputs) -> None:
        self._batch = _first(batch, _EXAMPLES)
        self._distance: OutputDistance | None = None
        quantized.set_rounding(False)
        try:
            self._distance = OutputDistance(quantized, [self._batch])
        except SlimkitError:
            pass
        finally:
            quantized.set_rounding(True)

    def warn(self, quantized: QuantizedModel) -> None:
        """Warn, in the plan too, if the outputs are closer to the noise than :data:`ENOUGH_DB`."""
        try:
            noise = 0.0 if self._distance is None else self._distance.noise(quantized)
        except SlimkitError:  # as many boxes as the network finds
            return
        level = decibels(noise)
        if level >= ENOUGH_DB:
            return
        found = (
            f"the outputs are only {level:.1f} dB above their difference from those of the float "
            "network"
            if math.isfinite(level)
            else "the outputs are not finite any more"
        )
        worst = _noisiest(quantized, _first(self._batch, _EXAMINED))
        told = f"{found}; most is rounded away in {worst}"
        plan = quantized.plan
        quantized.replace_plan(replace(plan, warnings=(*plan.warnings, told)))
        hint = "try observer='mse', methods=['gptq', 'bias_correction'], or limit="
        warnings.warn(f"{told}: {hint}Limit(min_sqnr={ENOUGH_DB:g})", stacklevel=3)


def output_check(work: Work) -> OutputCheck | None:
    """On the first calibration batch that was read; None if there was none."""
    if work.batches.first is None:
        return None
    device = next((p.device for p in work.quantized.parameters()), torch.device("cpu"))
    return OutputCheck(work.quantized, work.batches.first.to(device))


def _first(batch: Inputs, count: int) -> Inputs:
    """The first examples, or the batch where they cannot be told apart."""
    return batch if batch.examples is None else batch.part(0, count)


def _noisiest(quantized: QuantizedModel, batch: Inputs) -> str:
    """Layers whose own rounding makes most noise in their channels, the worst first."""
    rows = layer_noise(quantized, batch, pictured=0)["layers"]
    levels = {row["layer"]: row["channel_sqnr_db"] for row in rows}
    known = {layer: level for layer, level in levels.items() if level is not None}
    worst = sorted(known, key=lambda layer: known[layer])[:_NAMED]
    return ", ".join(f"{layer} ({known[layer]:.1f} dB)" for layer in worst)
