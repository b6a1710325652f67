"""SmoothQuant: outlier channels of activations move into the weights that read them.

In transformers a few channels behind a normalisation are a hundred times larger than the others,
which leaves the others a few levels of the one activation scale. The norm's weight and bias are
divided by a factor per channel, and the linear layers that read it are multiplied by it, which
changes nothing in float (Xiao et al., 2022, https://arxiv.org/abs/2211.10438, equation 4)::

    s_j = max|X_j|^α / max|W_j|^(1 − α)

with the largest magnitude of channel j on the calibration data, and of the weights of all linear
layers that read channel j.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from slimkit.errors import InputError
from slimkit.graph.capturing import Call, Graph, capture
from slimkit.quantize.methods.channel_scaling import Layer, Weights, channel_ranges, layer_of

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work

__all__ = ["Norm", "SmoothQuant", "norms"]

_NORMS = frozenset({"layer_norm", "rms_norm"})
_RESHAPES = frozenset({"flatten", "reshape", "unflatten", "view"})


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension and the linear layers that read its result.

    Attributes:
        call: that makes the result: ``layer_norm`` or ``rms_norm``, or the product with the
            weight at the end of a norm that is written out.
        parameters: names of its weight and, if it has one, bias.
        layers: all that read it.
    """

    call: Call
    parameters: tuple[str, ...]
    layers: tuple[Layer, ...]


def norms(graph: Graph) -> list[Norm]:
    """All normalisations whose channels can be scaled, in order of execution.

    Args:
        graph: of the network.
    """
    found = []
    for call in graph.calls:
        parameters = _scales(graph, call)
        layers = None if parameters is None else _readers(graph, call.outputs[0])
        if parameters is not None and layers:
            found.append(Norm(call, parameters, tuple(layers)))
    return found


def _scales(graph: Graph, call: Call) -> tuple[str, ...] | None:
    """Names of the parameters that every value of a channel is proportional to."""
    if len(call.outputs) != 1 or len(call.inputs) < 2:
        return None
    if call.function in _NORMS:
        parameters = call.inputs[1:]
    elif call.function == "mul" and len(call.inputs) == 2:
        parameters = tuple(v for v in call.inputs if graph.tensors[v].name is not None)
    else:
        return None
    channels = graph.tensors[call.outputs[0]].shape[-1:]
    infos = [graph.tensors[value] for value in parameters]
    if not infos or any(info.name is None or info.shape != channels for info in infos):
        return None
    if any(len(graph.call_consumers(info.id)) != 1 for info in infos):
        return None
    return tuple(str(info.name) for info in infos)


def _readers(graph: Graph, value: int) -> list[Layer] | None:
    """The linear layers that read ``value``, if nothing else does."""
    if value in graph.outputs:
        return None
    layers: list[Layer] = []
    for reader in graph.call_consumers(value):
        layer = layer_of(graph, reader)
        if layer is not None and layer.is_linear and reader.inputs[0] == value:
            layers.append(layer)
            continue
        behind = _readers(graph, reader.outputs[0]) if _keeps_channels(graph, reader) else None
        if behind is None:
            return None
        layers += behind
    return layers


def _keeps_channels(graph: Graph, call: Call) -> bool:
    """Whether the call only moves values and leaves the last dimension last."""
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return False
    before, after = (graph.tensors[v].shape for v in (call.inputs[0], call.outputs[0]))
    if call.function in ("transpose", "permute"):
        last, arguments = len(before) - 1, [*call.args[1:], *call.kwargs.values()]
        axes = arguments[0] if len(arguments) == 1 else arguments
        if not all(isinstance(axis, int) for axis in axes):
            return False
        axes = [axis % len(before) for axis in axes]
        return last not in axes if call.function == "transpose" else axes[-1] == last
    if call.function == "contiguous":
        return True
    return call.function in _RESHAPES and before[-1:] == after[-1:]


@dataclass(frozen=True)
class SmoothQuant:
    """Divide the channels behind LayerNorm and RMSNorm by equation 4; see the module.

    Attributes:
        alpha: how much of the outliers the weights take over, 0 … 1; the paper's 0.5 suits most
            networks, more (0.75) those with extreme outliers.
    """

    when: ClassVar[Literal["before", "after"]] = "before"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise InputError(f"{self.alpha} is not in [0, 1]", where="alpha")

    def run(self, work: Work) -> None:
        """Scale norms and linear layers of ``work.quantized.model`` in place."""
        model = work.quantized.model
        graph = capture(model, work.example)
        found = norms(graph)
        if not found:
            warnings.warn(
                "smoothquant: no normalisation is read by linear layers alone", stacklevel=2
            )
            return
        dims = {norm.layers[0].call.address: -1 for norm in found}
        seen = channel_ranges(model, work.inputs(), dims, graph.table)
        weights = Weights(model)
        for norm in found:
            if norm.layers[0].call.address in seen:
                self._smooth(norm, weights, seen[norm.layers[0].call.address].magnitude)
        weights.write()

    def _smooth(self, norm: Norm, weights: Weights, activation: torch.Tensor) -> None:
        readers = torch.stack([weights.input_range(layer) for layer in norm.layers]).amax(0)
        alive = (activation > 0) & (readers > 0)
        scale = activation.pow(self.alpha) / readers.pow(1.0 - self.alpha)
        scale = torch.where(alive, scale, 1.0)
        if alive.any():  # a common factor changes no error; without it numbers stay familiar
            scale = torch.where(alive, scale / scale[alive].log().mean().exp(), 1.0)
        for name in norm.parameters:
            weights.divide(name, scale)
        for layer in norm.layers:
            weights.multiply_inputs(layer, scale)
