"""Switches on a calibrated network: which of its layers are integer, and how wide.

The network is captured and calibrated once; a switch only changes the plan by which it
computes. Ranges of activations are those of the float network, so they do not depend on which
layers are integer, and the outputs equal those of a network quantized that way from the start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from slimkit.quantize.planning.partial_plans import integer_layers, leave_in_float, with_weight_bits
from slimkit.quantize.quantizers.fixed import WeightQuantizer
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.specs import named_weights
from slimkit.quantize.targets import Target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["LayerSwitches", "float_parameters"]


class LayerSwitches:
    """Some layers of a calibrated network put back to float, and back again.

    Args:
        quantized: calibrated, in evaluation mode; its plan is the one with all layers on.
        target: of its plan.
        originals: parameter name → value that it had before methods adjusted it to rounding,
            which a layer in float gets back.

    Attributes:
        layers: module paths of the integer layers, in order of execution.
    """

    def __init__(
        self,
        quantized: QuantizedModel,
        *,
        target: Target,
        originals: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.quantized = quantized
        self.layers = integer_layers(quantized.plan)
        self._target = target
        self._originals = originals or {}
        self._parameters = named_weights(quantized.model)

    @contextmanager
    def set(
        self, in_float: Collection[str] = (), bits: Mapping[str, int] | None = None
    ) -> Iterator[QuantizedModel]:
        """Inside, the layers ``in_float`` are off, and weights have ``bits`` (layer → bits)."""
        plan = with_weight_bits(self.plan(in_float), bits or {}, self._target)
        with ExitStack() as stack:
            stack.enter_context(self._weight_quantizers(plan))
            stack.enter_context(self._original_weights(in_float))
            stack.enter_context(self.quantized.using(plan))
            yield self.quantized

    def plan(self, in_float: Collection[str], reason: str = "put back to float") -> QuantPlan:
        """The plan with those layers off."""
        if not in_float:
            return self.quantized.plan
        return leave_in_float(
            self.quantized.plan, in_float, float_outputs=self._target.float_outputs, reason=reason
        )

    def leave(self, in_float: Collection[str], plan: QuantPlan) -> QuantizedModel:
        """Those layers stay off for good, by a plan of :meth:`plan`; the switches are used up."""
        with torch.no_grad():
            for name, value in self._of(in_float).items():
                self._parameters[name].copy_(value)
        self.quantized.replace_plan(plan)
        return self.quantized

    def _of(self, layers: Collection[str]) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in self._originals.items()
            if name.rpartition(".")[0] in layers
        }

    @contextmanager
    def _original_weights(self, layers: Collection[str]) -> Iterator[None]:
        adjusted = {name: self._parameters[name].data for name in self._of(layers)}
        try:
            for name, value in self._of(layers).items():
                self._parameters[name].data = value
            yield
        finally:
            for name, value in adjusted.items():
                self._parameters[name].data = value

    @contextmanager
    def _weight_quantizers(self, plan: QuantPlan) -> Iterator[None]:
        """Quantizers of another width than they have are exchanged."""
        quantizers = self.quantized.quantizers
        held: dict[str, nn.Module] = {}
        try:
            for spec in plan.quantizers:
                quantizer = quantizers[spec.name]
                if isinstance(quantizer, WeightQuantizer) and quantizer.form != spec.form:
                    held[spec.name] = quantizer
                    quantizers[spec.name] = WeightQuantizer(spec).to(quantizer.scale.device)
            yield
        finally:
            for name, quantizer in held.items():
                quantizers[name] = quantizer


def float_parameters(quantized: QuantizedModel) -> dict[str, Tensor]:
    """Copies of the parameters of the integer layers as they are now: name → value."""
    layers = set(integer_layers(quantized.plan))
    return {
        name: parameter.detach().clone()
        for name, parameter in quantized.model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] in layers
    }
