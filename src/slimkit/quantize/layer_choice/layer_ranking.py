"""Noise and cost of layers: what decides which of them go back to float."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import TYPE_CHECKING

from slimkit.artifact import PathLike
from slimkit.measure.profiling import profile
from slimkit.quantize.layer_choice.layer_sensitivity import (
    measure_sensitivity,
    noise_scorer,
    units_of,
)
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares, estimated_noise
from slimkit.quantize.planning.partial_plans import integer_layers

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work

__all__ = ["multiply_adds", "noise_shares"]

_MEASURED_BATCHES = 2
"""Calibration batches that layers are measured on one by one, where gradients are of no use."""


def multiply_adds(work: Work) -> dict[str, int]:
    """Layer → its multiply-adds in the example, where it has any.

    An integer layer counts also if its weight is a buffer, so that it owns no parameters.
    """
    rows = profile(work.reference, work.example).layers
    layers = set(integer_layers(work.quantized.plan))
    return {row.name: row.macs for row in rows if row.macs and (row.params or row.name in layers)}


def noise_shares(
    work: Work, switches: LayerSwitches, *, file: PathLike | None = None
) -> NoiseShares:
    """Of every layer in the noise of the outputs, on the first calibration data.

    Estimated by backward passes, unless measurements are to be kept or the network has no
    derivatives; then every layer is measured alone.

    Args:
        work: with ranges of activations.
        switches: of its network.
        file: keeps the measurements; see :func:`~slimkit.quantize.sensitivity`.
    """
    if file is None:
        with contextlib.suppress(RuntimeError):
            shares = estimated_noise(switches, work.inputs())
            if shares.of(switches.layers) > 0:  # else no gradient came through
                return shares
    table = measure_sensitivity(
        switches,
        noise_scorer(work.reference, islice(work.inputs(), _MEASURED_BATCHES)),
        measure="sqnr",
        units=units_of(switches),
        file=file,
        progress=work.progress,
    )
    return NoiseShares.measured({layer: table.damage(layer) for layer in table.ranking()})
