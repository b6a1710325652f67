"""What methods that rescale channels have in common: layers, their weights, ranges on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.graph.addressing import AddressMode
from slimkit.graph.call_table import CallTable
from slimkit.graph.capturing import Call, Graph
from slimkit.inputs import Inputs

__all__ = ["ChannelRanges", "Layer", "Weights", "channel_ranges", "layer_of", "only_reader"]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that owns its parameters and runs once.

    Attributes:
        call: that runs it.
        weight: name of its weight, (out, in / groups, kernel …).
        bias: name of its bias, if it has one.
        groups: of the convolution; 1 for a linear layer.
    """

    call: Call
    weight: str
    bias: str | None
    groups: int

    @property
    def is_linear(self) -> bool:
        """Whether it works on the last dimension."""
        return self.call.function == "linear"

    @property
    def channel_dim(self) -> int:
        """Of its input and its output."""
        return -1 if self.is_linear else 1


def layer_of(graph: Graph, call: Call) -> Layer | None:
    """The layer behind a call; ``None`` if there is none or its parameters have other readers."""
    if call.function not in (*_CONVOLUTIONS, "linear") or len(call.inputs) < 2:
        return None
    parameters = [graph.tensors[value] for value in call.inputs[1:]]
    if any(info.name is None or len(graph.call_consumers(info.id)) != 1 for info in parameters):
        return None
    data, weight = graph.tensors[call.inputs[0]].shape, parameters[0].shape
    if call.function != "linear" and len(data) != len(weight):
        return None  # without a batch dimension
    groups = 1 if call.function == "linear" else data[1] // weight[1]
    bias = parameters[1].name if len(parameters) > 1 else None
    return Layer(call, str(parameters[0].name), bias, groups)


def only_reader(graph: Graph, value: int) -> Call | None:
    """The call that reads ``value``, if it is the only one and the value does not leave."""
    readers = graph.call_consumers(value)
    return readers[0] if len(readers) == 1 and value not in graph.outputs else None


class Weights:
    """Parameters in double precision while they are scaled, so that they are rounded once.

    Args:
        model: whose parameters; they change when :meth:`write` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._values: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            self._values[name] = self._parameters[name].detach().double()
        return self._values[name]

    def divide(self, name: str, scale: Tensor) -> None:
        """Divide output channels, dimension 0, by ``scale``, (out,)."""
        value = self[name]
        self._values[name] = value / scale.reshape(-1, *[1] * (value.dim() - 1))

    def multiply_inputs(self, layer: Layer, scale: Tensor) -> None:
        """Multiply what reads each input channel by ``scale``, (in,)."""
        value = self[layer.weight]
        grouped = value.reshape(layer.groups, -1, value.shape[1], *value.shape[2:])
        shape = (layer.groups, 1, value.shape[1], *[1] * (value.dim() - 2))
        self._values[layer.weight] = (grouped * scale.reshape(shape)).reshape(value.shape)

    def output_range(self, layer: Layer) -> Tensor:
        """The largest magnitude of each output channel's weights, (out,)."""
        return self[layer.weight].abs().flatten(1).amax(1)

    def input_range(self, layer: Layer) -> Tensor:
        """The largest magnitude of the weights that read each input channel, (in,)."""
        value = self[layer.weight].abs()
        return (
            value.reshape(layer.groups, -1, value.shape[1], value[0, 0].numel())
            .amax((1, 3))
            .flatten()
        )

    @torch.no_grad()
    def write(self) -> None:
        """Put all values into the model."""
        for name, value in self._values.items():
            self._parameters[name].copy_(value)


@dataclass(frozen=True)
class ChannelRanges:
    """Of what a call reads first, over all batches.

    Attributes:
        high: the largest value of each channel, (C,), float64.
        magnitude: the largest magnitude likewise.
    """

    high: Tensor
    magnitude: Tensor


@torch.no_grad()
def channel_ranges(
    model: nn.Module, batches: Iterable[Inputs], dims: Mapping[str, int], table: CallTable
) -> dict[str, ChannelRanges]:
    """Run ``model`` on all batches and look at what some calls read.

    Args:
        model: in evaluation mode.
        batches: calls.
        dims: call address → dimension of the channels in its first argument.
        table: of the capture that the addresses are from.

    Returns:
        Call address → ranges; without the calls that never ran.

    Raises:
        AddressError: a batch makes other calls, and one of these cannot be told.
    """
    watch = _Watch(model, dims, table)
    for inputs in batches:
        with watch:
            inputs.call(model)
    return watch.found


class _Watch(AddressMode):
    def __init__(self, model: nn.Module, dims: Mapping[str, int], table: CallTable) -> None:
        super().__init__(model, table, dims.keys())
        self._dims = dims
        self.found: dict[str, ChannelRanges] = {}

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if address in self._dims:
            x: Tensor = args[0] if args else kwargs["input"]
            x = x[None] if x.dim() == 1 else x
            others = [dim for dim in range(x.dim()) if dim != self._dims[address] % x.dim()]
            low, high = x.amin(others).double(), x.amax(others).double()
            before = self.found.get(address)
            seen = ChannelRanges(high, torch.maximum(high, -low))
            if before is not None:
                magnitude = torch.maximum(seen.magnitude, before.magnitude)
                seen = ChannelRanges(torch.maximum(high, before.high), magnitude)
            self.found[address] = seen
        return func(*args, **kwargs)
