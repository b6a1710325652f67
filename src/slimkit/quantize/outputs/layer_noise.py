"""What rounding does to the weights and outputs of each layer, as compact facts for a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.inputs import Inputs
from slimkit.modules import evaluation
from slimkit.quantize.outputs.distance import decibels
from slimkit.quantize.specs import Decision, named_weights
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["layer_noise"]

BINS = 48
"""Of a histogram in the report: as many as its pictures are wide enough for."""


def layer_noise(
    quantized: QuantizedModel,
    batch: Inputs,
    *,
    original: nn.Module | None = None,
    pictured: int = 4,
) -> dict[str, Any]:
    """Signal to noise of every integer layer, and histograms of the most damaged ones.

    Two forwards: one of the float network, whose activations are held in memory, and one of the
    quantized network.

    Args:
        quantized: calibrated.
        batch: a few examples, on the device of the network.
        original: the network before quantization, which is not changed; without it the
            quantized one with all rounding off.
        pictured: histograms of so many layers.

    Returns:
        JSON-able. ``layers``: per layer in order of execution ``layer``, ``bits`` of its weights,
        ``sqnr_db`` of its output (behind the activation function, noise of the layers before it
        included), of its own rounding alone ``weight_sqnr_db`` and ``output_sqnr_db``, and of both
        together ``channel_sqnr_db``, for which noise / signal is averaged over output channels:
        it is low when some channels are lost beside larger ones; None where nothing changed.
        ``histograms``: of the layers whose own rounding makes most noise
        ``weights`` and ``outputs``: ``low``, ``high``, and counts ``before`` and ``after`` in
        bins of equal width.
    """
    layers = {d.module: d for d in quantized.plan.decisions if d.integer and d.weight is not None}
    with evaluation(quantized):
        before, weights = _float_side(quantized, batch, layers, original)
        after = _outputs(quantized, batch, layers)
        rounded = _weights(quantized, layers)
    bits = quantized.plan.bit_widths()
    rows: list[dict[str, Any]] = []
    for layer, decision in layers.items():
        if layer not in before or layer not in after:
            continue
        weight, output = (weights[layer], rounded[layer]), (before[layer], after[layer])
        own = before[layer], _rounded(quantized, decision, before)
        rows.append(
            {
                "layer": layer,
                "bits": bits[layer][0],
                "sqnr_db": _sqnr(*output),
                "weight_sqnr_db": _sqnr(*weight),
                "output_sqnr_db": _sqnr(*own),
                "channel_sqnr_db": _channel_sqnr(weight, own),
            }
        )
    damaged = sorted(rows, key=lambda row: -_own_noise(row))
    pictures = [
        {
            "layer": name,
            "weights": _histogram(weights[name], rounded[name]),
            "outputs": _histogram(before[name], after[name]),
        }
        for name in [row["layer"] for row in damaged[:pictured]]
    ]
    return {"layers": rows, "histograms": pictures}


def _float_side(
    quantized: QuantizedModel,
    batch: Inputs,
    layers: Mapping[str, Decision],
    original: nn.Module | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and weights of the float network."""
    network = quantized
    if original is not None:  # its activation quantizers have no scale: values pass unchanged
        network = QuantizedModel(quantized.plan.folded(original), quantized.plan).eval()
    network.set_rounding(False)
    try:
        return _outputs(network, batch, layers), _weights(network, layers)
    finally:
        network.set_rounding(True)


@torch.no_grad()
def _weights(network: QuantizedModel, layers: Mapping[str, Decision]) -> dict[str, Tensor]:
    """Layer → its weight as the layer multiplies with it, (output channels, rest)."""
    parameters = named_weights(network.model)
    specs = {spec.name: spec for spec in network.plan.quantizers}
    found: dict[str, Tensor] = {}
    for layer, decision in layers.items():
        spec = specs[str(decision.weight)]
        assert spec.parameter is not None
        weight = network.quantizers[spec.name](parameters[spec.parameter])
        found[layer] = weight.detach().movedim(spec.axis, 0).flatten(1)
    return found


@torch.no_grad()
def _outputs(
    network: QuantizedModel, batch: Inputs, layers: Mapping[str, Decision]
) -> dict[str, Tensor]:
    """Layer → its output: what its quantizer passes on, or what leaves in float.

    (channels, rest), of all calls.
    """
    found: dict[str, list[Tensor]] = {}
    with _hooks(network, layers, found):
        batch.run(network)
    parameters = named_weights(network.model)
    ranks = {
        spec.name: parameters[spec.parameter].dim()
        for spec in network.plan.quantizers
        if spec.parameter is not None
    }
    return {
        layer: torch.cat(
            [_channels_first(value, ranks[str(layers[layer].weight)]) for value in values], 1
        )
        for layer, values in found.items()
    }


def _channels_first(output: Tensor, rank: int) -> Tensor:
    """(…, C) of a linear layer and (N, C, …) or (C, …) of a convolution as (C, rest)."""
    axis = -1 if rank == 2 else output.dim() + 1 - rank
    return output.detach().movedim(axis, 0).flatten(1)


@contextmanager
def _hooks(
    network: QuantizedModel, layers: Mapping[str, Decision], found: dict[str, list[Tensor]]
) -> Iterator[None]:
    handles = []
    for layer, decision in layers.items():
        inside = decision.writes is None
        module = network.model if inside else network.quantizers
        module = module.get_submodule(layer if inside else str(decision.writes))

        def keep(
            _module: nn.Module, _args: Any, output: Any, layer: str = layer, inside: bool = inside
        ) -> None:
            if isinstance(output, Tensor):  # what is computed inside of the network is addressed
                found.setdefault(layer, []).append(output if inside else output.clone())

        handles.append(module.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _rounded(quantized: QuantizedModel, decision: Decision, before: Mapping[str, Tensor]) -> Tensor:
    """The float output of a layer, rounded by its quantizer."""
    output = before[decision.module]
    return output if decision.writes is None else quantized.quantizers[decision.writes](output)


def _own_noise(row: Mapping[str, Any]) -> float:
    """Noise / signal of weights and output of a layer, summed."""
    both = (row["weight_sqnr_db"], row["output_sqnr_db"])
    return float(sum(10.0 ** (-value / 10.0) for value in both if value is not None))


def _sqnr(before: Tensor, after: Tensor) -> float | None:
    """In dB; None where nothing changed, or there is no signal."""
    signal = float(before.double().square().sum())
    noise = float((after.double() - before.double()).square().sum())
    return round(decibels(noise / signal), 2) if signal > 0 and noise > 0 else None


def _channel_sqnr(*pairs: tuple[Tensor, Tensor]) -> float | None:
    """In dB, of noise / signal as the mean over channels; a channel that is lost counts as 1."""
    share = 0.0
    for before, after in pairs:
        signal = before.double().square().sum(1)
        noise = (after.double() - before.double()).square().sum(1)
        kept = signal > 0
        if kept.any():
            share += float((noise[kept] / signal[kept]).clamp(max=1.0).mean())
    return round(decibels(share), 2) if share > 0 else None


def _histogram(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Both on the same bins."""
    low = float(min(before.min(), after.min()))
    high = float(max(before.max(), after.max()))
    if high <= low:
        high = low + 1.0

    def counts(values: Tensor) -> list[int]:
        found = torch.histc(values.detach().float().cpu(), BINS, low, high)
        return [int(count) for count in found]

    return {"low": low, "high": high, "before": counts(before), "after": counts(after)}
