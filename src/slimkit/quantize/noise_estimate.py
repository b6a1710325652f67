"""The noise that each layer alone would make in the outputs, by a few backward passes.

Rounding moves a tensor v to v + e. To first order the outputs y move by J·e, and with random
signs r, which are independent of each other, E[(rᵀ·J·e)²] = ‖J·e‖² (Hutchinson, 1989). One
backward pass gives rᵀ·J·e of every quantizer at once: it is the derivative of rᵀ·y by a factor t
in v + t·e, at t = 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimkit.inputs import Inputs
from slimkit.quantize.layer_switches import LayerSwitches
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.wrapper import QuantizedModel, Rounding

__all__ = ["estimated_noise"]

_PROBES = 4
"""Backward passes for each example: of four examples the estimates are right within a third."""


def estimated_noise(switches: LayerSwitches, batches: Iterable[Inputs]) -> dict[str, float]:
    """Layer → noise / signal of the outputs if it alone is integer, to first order.

    Args:
        switches: of a calibrated network in evaluation mode.
        batches: a few examples, on the device of the network.

    Returns:
        For every layer of ``switches``; of several outputs the mean of theirs, as
        :meth:`~slimkit.quantize.output_distance.OutputDistance.noise` counts.

    Raises:
        RuntimeError: the network cannot be differentiated.
    """
    quantized = switches.quantized
    examples = [example for batch in batches for example in _singly(batch)]
    with torch.no_grad():
        found = [_power(_outputs(example.call(quantized.model))) for example in examples]
    power = torch.stack(found).sum(0)
    generator = torch.Generator().manual_seed(0)
    samples: list[dict[str, float]] = []
    for example in examples:  # one graph at a time is in memory
        samples += _Shares(quantized, example).sampled(power, generator)
    noise: dict[str, float] = {}
    for layer in switches.layers:
        names = _quantizers(switches.plan(set(switches.layers) - {layer}))
        sums = (sum(sample.get(name, 0.0) for name in names) for sample in samples)
        noise[layer] = sum(value * value for value in sums) / _PROBES
    return noise


class _Shares:
    """Every quantizer's share in the outputs of one example."""

    def __init__(self, quantized: QuantizedModel, example: Inputs) -> None:
        self._factors: dict[str, Tensor] = {}
        with torch.enable_grad(), quantized.attachment(dict(self._hooks(quantized))):
            self._outputs = _outputs(example.call(quantized.model))

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


def _singly(batch: Inputs) -> list[Inputs]:
    """The examples of a batch, if all tensors have one dimension of examples."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in batch.tensors()}
    if len(sizes) != 1 or sizes == {0}:
        return [batch]
    return [
        batch.map(lambda tensor, i=i: tensor[i : i + 1])  # type: ignore[misc]
        for i in range(sizes.pop())
    ]


def _outputs(found: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
    return [leaf.double() for leaf in leaves if leaf.is_floating_point()]


def _power(outputs: list[Tensor]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs])


def _quantizers(plan: QuantPlan) -> list[str]:
    """Names of those that the plan uses."""
    return [spec.name for spec in plan.quantizers]
