"""Cross-layer equalization: channels of about the same range, at no cost in float.

Where one layer feeds another through a function with ``f(s · x) = s · f(x)`` for s > 0, dividing
channel i of the first by s_i and multiplying what reads it in the second by s_i changes nothing
but the ranges (Nagel et al., 2019, https://arxiv.org/abs/1906.04721, section 4.1). With one scale
for a whole weight, channels of small range get few levels; the paper's choice gives channel i the
same range in both weights, which is the best (equation 11)::

    s_i = sqrt(r1_i · r2_i) / r2_i

With one scale per output channel the first weight does not mind, so r1 is the range of the
*activation* between the two layers, which has one scale in all: large channels are made smaller
as far as the second weight can take it. A depthwise second weight can take all of it.

Two things go beyond the paper. ReLU6 is not homogeneous, so a channel that reaches the bound on
the calibration data keeps its scale, and no other may come to reach it. And with ranges of
weights no channel may grow beyond the largest value of the activation, as dead channels with
large biases would (the paper moves such biases into the next layer instead).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.graph.capturing import Call, Graph, capture
from slimkit.quantize.methods.channel_scaling import (
    Layer,
    Weights,
    channel_ranges,
    layer_of,
    only_reader,
)

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work

__all__ = ["Equalize", "Link", "links"]

_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "dropout", "contiguous"})
_OVER_SPACE = frozenset(
    {f"{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)}
    | {f"adaptive_{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)}
)
_RESHAPES = frozenset({"flatten", "reshape", "view"})


@dataclass(frozen=True)
class Link:
    """Two layers with nothing but homogeneous functions of single channels between them.

    Attributes:
        first: makes the channels.
        second: reads them, and alone.
        repeats: input features of ``second`` per channel, behind a flattening.
        clip: the call of a ReLU6 between them.
        bound: of the ReLU6.
    """

    first: Layer
    second: Layer
    repeats: int = 1
    clip: Call | None = None
    bound: float = math.inf

    def __str__(self) -> str:
        return f"{self.first.call.module} → {self.second.call.module}"


def links(graph: Graph) -> list[Link]:
    """All pairs of layers that can be equalized, in order of execution.

    Args:
        graph: of a network with batch norms folded.
    """
    layers = (layer_of(graph, call) for call in graph.calls)
    found = (_follow(graph, layer) for layer in layers if layer is not None)
    return [link for link in found if link is not None]


def _follow(graph: Graph, first: Layer) -> Link | None:
    """From a layer to the one that alone reads its channels."""
    value, repeats = first.call.outputs[0], 1
    clip, bound = None, math.inf
    while True:
        reader = only_reader(graph, value)
        if reader is None or reader.inputs[0] != value:
            return None
        second = layer_of(graph, reader)
        if second is not None:
            return _joined(graph, Link(first, second, repeats, clip, bound), value)
        if len(reader.outputs) != 1:
            return None
        before, after = (graph.tensors[v].shape for v in (value, reader.outputs[0]))
        limit = _upper_bound(reader)
        if limit is not None and clip is None:
            clip, bound = reader, limit
        elif not first.is_linear and reader.function in _RESHAPES:
            if len(after) != 2 or after != (before[0], math.prod(before[1:])):
                return None
            repeats *= after[1] // before[1]
        elif reader.function not in _HOMOGENEOUS and (
            first.is_linear or reader.function not in _OVER_SPACE
        ):
            return None
        value = reader.outputs[0]


def _joined(graph: Graph, link: Link, value: int) -> Link | None:
    """``link`` if the second layer reads along the dimension that the first one wrote."""
    first, second, shape = link.first, link.second, graph.tensors[value].shape
    if first.is_linear != second.is_linear and len(shape) != 2:
        return None
    if shape[second.channel_dim] != link.repeats * graph.tensors[first.call.inputs[1]].shape[0]:
        return None
    return link


def _upper_bound(call: Call) -> float | None:
    """Of a function that clips to [0, bound]; ``None`` for other functions."""
    if call.function == "relu6":
        return 6.0
    if call.function != "hardtanh":
        return None
    low, high = (
        call.args[position] if len(call.args) > position else call.kwargs.get(name, default)
        for position, name, default in ((1, "min_val", -1.0), (2, "max_val", 1.0))
    )
    return float(high) if low == 0 and high > 0 else None


@dataclass(frozen=True)
class Equalize:
    """Give the channels between two layers about the same range; see the module.

    Attributes:
        ranges: what is weighed against the second layer's weights: the first layer's
            ``"weights"``, the ``"activations"`` between them, or ``"auto"``: weights for
            ``granularity="tensor"``, activations for ``"channel"``.
        iterations: at most so many passes over all pairs; it stops once nothing changes.
        headroom: a channel in front of a ReLU6 may grow until so many times its largest value
            reaches the bound, ≥ 1.
    """

    when: ClassVar[Literal["before", "after"]] = "before"

    ranges: Literal["auto", "weights", "activations"] = "auto"
    iterations: int = 20
    headroom: float = 1.25

    def __post_init__(self) -> None:
        if self.ranges not in ("auto", "weights", "activations"):
            raise InputError(f"unknown ranges {self.ranges!r}", where="ranges")
        if self.iterations < 1:
            raise InputError(f"{self.iterations} is not ≥ 1", where="iterations")
        if self.headroom < 1.0:
            raise InputError(f"{self.headroom} is not ≥ 1", where="headroom")

    def run(self, work: Work) -> None:
        """Scale weights and biases of ``work.quantized.model`` in place."""
        model = work.quantized.model
        per_channel = work.quantized.plan.granularity == "channel"
        by_weights = self.ranges == "weights" or (self.ranges == "auto" and not per_channel)
        graph = capture(model, work.example)
        found = links(graph)
        if not found:
            warnings.warn("equalize: no two layers can be equalized", stacklevel=2)
            return
        weights = Weights(model)
        states = list(self._states(work, graph, found, weights, per_channel))
        for _ in range(self.iterations):
            changes = [
                state.step(by_weights=by_weights, headroom=self.headroom) for state in states
            ]
            if max(changes) < 1e-3:
                break
        weights.write()

    def _states(
        self, work: Work, graph: Graph, found: list[Link], weights: Weights, per_channel: bool
    ) -> Iterator[_State]:
        dims = {link.second.call.address: link.second.channel_dim for link in found}
        dims |= {
            link.clip.address: link.first.channel_dim for link in found if link.clip is not None
        }
        seen = channel_ranges(work.quantized.model, work.inputs(), dims, graph.table)
        for link in found:
            if link.second.call.address in seen:
                magnitude = seen[link.second.call.address].magnitude
                high = None if link.clip is None else seen[link.clip.address].high
                activation = magnitude.reshape(-1, link.repeats).amax(1)
                yield _State(link, weights, activation, high, per_channel)


class _State:
    """One pair of layers on the way.

    Args:
        link: the pair.
        weights: of the network, which it changes.
        activation: largest magnitudes between the layers, (channels,).
        high: largest values in front of the ReLU6, if there is one.
        per_channel: whether weights have one scale per output channel.
    """

    def __init__(
        self,
        link: Link,
        weights: Weights,
        activation: Tensor,
        high: Tensor | None,
        per_channel: bool,
    ) -> None:
        self.link, self.weights = link, weights
        self.activation, self.high = activation, high
        second = link.second
        depthwise = second.groups > 1 and second.groups == activation.numel()
        self.free = per_channel and depthwise

    def step(self, *, by_weights: bool, headroom: float) -> float:
        """One update by equation 11; returns the largest change of any channel, |log s|."""
        first, second = self.link.first, self.link.second
        r1 = self.weights.output_range(first) if by_weights else self._activation_range()
        r2 = self.weights.input_range(second).reshape(-1, self.link.repeats).amax(1)
        if self.free and not by_weights:
            r2 = self.activation.amax().expand_as(r2)
        scale = self._limited(r1, r2, by_weights, headroom)
        self.weights.divide(first.weight, scale)
        if first.bias is not None:
            self.weights.divide(first.bias, scale)
        self.weights.multiply_inputs(second, scale.repeat_interleave(self.link.repeats))
        self.activation = self.activation / scale
        self.high = None if self.high is None else self.high / scale
        return float(scale.log().abs().max())

    def _activation_range(self) -> Tensor:
        """Channels that are 0 on all data count like the smallest: the second weight gains."""
        seen = self.activation > 0
        return (
            torch.where(seen, self.activation, self.activation[seen].amin())
            if seen.any()
            else self.activation
        )

    def _limited(self, r1: Tensor, r2: Tensor, by_weights: bool, headroom: float) -> Tensor:
        """Equation 11 up to a common factor, within what ReLU6 and the activation's range allow."""
        alive = (r1 > 0) & (r2 > 0)
        scale = torch.where(alive, r1 / r2, 1.0).nan_to_num(1.0).sqrt()
        clipped = torch.zeros_like(alive) if self.high is None else self.high >= self.link.bound
        middle = clipped & alive if (clipped & alive).any() else alive
        if middle.any():  # a common factor changes nothing, unless some channels cannot follow
            scale = torch.where(alive, scale / scale[middle].log().quantile(0.5).exp(), 1.0)
        if self.high is not None:
            scale = torch.maximum(scale, (headroom * self.high / self.link.bound).clamp(max=1.0))
        largest = self.activation.amax()
        if by_weights and largest > 0:
            scale = torch.maximum(scale, self.activation / largest)
        return torch.where(clipped, 1.0, scale)
