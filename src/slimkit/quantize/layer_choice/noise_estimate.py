"""Hutchinson's estimate of the noise that each layer alone makes in the outputs.

Rounding moves a tensor v to v + e. To first order the outputs y move by J·e, and with random
signs r, which are independent of each other, E[(rᵀ·J·e)²] = ‖J·e‖² (Hutchinson, 1989). One
backward pass gives rᵀ·J·e of every quantizer at once: it is the derivative of rᵀ·y by a factor t
in v + t·e, at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.inputs import Inputs
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.outputs.distance import float_tensors
from slimkit.quantize.wrapper import QuantizedModel, Rounding

__all__ = ["NoiseShares", "estimated_noise"]

_EXAMPLES = 16
"""Calibration examples, one forward with gradients each."""
_PROBES = 4
"""Backward passes for each example, with other random signs. The standard error of an estimate
falls with the root of their product, 64, which ranks layers well enough."""


@dataclass(frozen=True)
class NoiseShares:
    """Who makes the noise in the outputs.

    Attributes:
        noise: name of a quantizer → noise / signal of the outputs that it alone makes.
        needed: layer → quantizers that it needs to be integer; neighbours share them.
    """

    noise: Mapping[str, float]
    needed: Mapping[str, frozenset[str]]

    @classmethod
    def measured(cls, noise: Mapping[str, float]) -> NoiseShares:
        """Of layers that were quantized alone: layer → noise / signal of the outputs."""
        return cls(noise, {layer: frozenset((layer,)) for layer in noise})

    def of(self, layers: Iterable[str]) -> float:
        """Noise / signal if these layers are integer; independent noise adds up."""
        return self._sum(self._used(layers))

    def added(self, layer: str, integer: Collection[str]) -> float:
        """What ``layer`` adds to the noise of those that are integer already."""
        return self._sum(self.needed[layer] - self._used(integer))

    def worst_first(self, costs: Mapping[str, float]) -> list[str]:
        """All layers, in the order in which they should go back to float.

        Beginning with a network in float, the layer becomes integer next that adds least noise
        for what it costs in float, given those that are integer by then.
        """
        used: set[str] = set()
        left = list(self.needed)
        order = []
        while left:
            following = min(left, key=lambda x: self._sum(self.needed[x] - used) / costs[x])
            left.remove(following)
            used |= self.needed[following]
            order.append(following)
        return order[::-1]

    def _used(self, layers: Iterable[str]) -> set[str]:
        return {name for layer in layers for name in self.needed[layer]}

    def _sum(self, names: Iterable[str]) -> float:
        return math.fsum(self.noise.get(name, 0.0) for name in names)  # in whatever order


def estimated_noise(switches: LayerSwitches, batches: Iterable[Inputs]) -> NoiseShares:
    """The shares of all layers of a calibrated network, to first order.

    Args:
        switches: of the network, in evaluation mode.
        batches: on the device of the network; their first 16 examples are used. Of several outputs
            the noise is the mean of theirs, as
            :meth:`~slimkit.quantize.outputs.distance.OutputDistance.noise` counts.

    Raises:
        RuntimeError: the network cannot be differentiated.
    """
    quantized = switches.quantized
    singly = (example for batch in batches for example in batch.split(1))
    examples = list(islice(singly, _EXAMPLES))
    with torch.no_grad():
        found = [_power(_outputs(example.run(quantized.model))) for example in examples]
    power = torch.stack(found).sum(0)
    generator = torch.Generator().manual_seed(0)
    noise = dict.fromkeys(quantized.quantizers, 0.0)
    for example in examples:  # one graph at a time is in memory
        for sample in _Shares(quantized, example).sampled(power, generator):
            for name, value in sample.items():
                noise[name] += value * value / _PROBES
    layers = set(switches.layers)
    needed = {
        layer: frozenset(spec.name for spec in switches.plan(layers - {layer}).quantizers)
        for layer in switches.layers
    }
    return NoiseShares(noise, needed)


class _Shares:
    """Every quantizer's share in the outputs of one example."""

    def __init__(self, quantized: QuantizedModel, example: Inputs) -> None:
        self._factors: dict[str, Tensor] = {}
        with torch.enable_grad(), quantized.attachment(dict(self._hooks(quantized))):
            self._outputs = _outputs(example.run(quantized.model))

    def sampled(self, power: Tensor, generator: torch.Generator) -> Iterator[dict[str, float]]:
        """Quantizer → what its rounding adds to the outputs, summed with random signs.

        Args:
            power: Σ output² of each output, of all examples together: (outputs).
            generator: of the signs.
        """
        weights = (power * torch.count_nonzero(power)).rsqrt().nan_to_num(posinf=0.0)
        names, factors = list(self._factors), list(self._factors.values())
        for probe in range(_PROBES):
            total = torch.zeros((), dtype=torch.float64, device=power.device)
            with torch.enable_grad():
                for output, weight in zip(self._outputs, weights, strict=True):
                    bits = torch.randint(0, 2, output.shape, generator=generator)
                    total = total + weight * (output * (2 * bits - 1).to(output)).sum()
            kept = probe < _PROBES - 1
            slopes = torch.autograd.grad(
                total, factors, retain_graph=kept, materialize_grads=True
            )  # zero where an output does not depend on it
            yield dict(zip(names, (slope.item() for slope in slopes), strict=True))

    def _hooks(self, quantized: QuantizedModel) -> Iterator[tuple[str, Rounding]]:
        for name, quantizer in quantized.quantizers.items():
            yield name, self._hook(name, quantizer)

    def _hook(self, name: str, quantizer: nn.Module) -> Rounding:
        def added(value: Tensor) -> Tensor:
            with torch.no_grad():
                error: Tensor = quantizer(value) - value
            if name not in self._factors:
                self._factors[name] = torch.zeros((), device=value.device, requires_grad=True)
            return value + self._factors[name] * error

        return added


def _outputs(found: Any) -> list[Tensor]:
    return [tensor.double() for tensor in float_tensors(found)]


def _power(outputs: list[Tensor]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs])
