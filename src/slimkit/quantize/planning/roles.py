"""What part a call can play: layer, sum, pooling, or something the target has no integers for."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from slimkit.graph.capturing import Call, Graph
from slimkit.quantize.targets import Target

__all__ = ["COMPILED", "Roles"]

COMPILED = "TorchScript stays in float: the calls inside cannot be followed"

_CONCATENATIONS = ("cat", "concat")


class Roles:
    """Answers questions about the calls of one network for one target.

    Args:
        graph: of the network with batch norms folded.
        target: what the runtime can do.
        skipped: paths of modules that stay in float.
        compiled: paths of modules of TorchScript, whose calls happen unseen.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        skipped: Iterable[str],
        compiled: Iterable[str] = (),
    ) -> None:
        self._graph = graph
        self._target = target
        self._skipped = frozenset(skipped)
        self._compiled = tuple(compiled)

    def why_float(self, call: Call, integers: set[int]) -> str | None:
        """Why ``call`` stays in float, ``None`` when it becomes integer.

        Args:
            call: to look at.
            integers: values that integer operators before it make.
        """
        target, function = self._target, call.function
        known = {*target.layers, *target.joins, *target.pools, *target.products}
        if function not in known | target.activations:
            return f"{target.name} has no integer {function}"
        if self.is_compiled(call):
            return COMPILED
        if self.is_skipped(call):
            return "skipped by pattern"
        tensors = [self._graph.tensors[value] for value in (*call.inputs, *call.outputs)]
        if any(info.dtype != torch.float32 for info in tensors):
            return "not in 32-bit floating point"
        if function in target.layers:
            return self.why_float_layer(call)
        if function in target.products:
            return self._why_float_product(call)
        if function in target.joins:
            return self._why_float_join(call, integers)
        return self._why_float_unary(call, integers)

    def why_float_layer(self, call: Call) -> str | None:
        """The same for a layer: its weight must be a parameter, its input must not."""
        if len(call.inputs) < 2 or self.parameter(call.inputs[1]) is None:
            return "its weight is computed, not a parameter"
        if self.parameter(call.inputs[0]) is not None:
            return "its input is a parameter"
        return None

    def keeps_integers(self, call: Call) -> bool:
        """Whether ``call`` computes in float with a weight that can be kept as integers."""
        if call.function not in {*self._target.stored, *self._target.layers}:
            return False
        if self.is_compiled(call) or self.is_skipped(call):
            return False
        if self.why_float_layer(call) is not None:
            return False
        return self._graph.tensors[call.inputs[1]].dtype == torch.float32

    def is_compiled(self, call: Call) -> bool:
        """Whether it runs inside of a module of TorchScript, where nothing can be rounded."""
        return any(f"{call.module}.".startswith(f"{path}.") for path in self._compiled)

    def is_skipped(self, call: Call) -> bool:
        """Whether a pattern of the user takes it out."""
        return self.module(call) in self._skipped or call.module in self._skipped

    def axis(self, call: Call) -> int:
        """The dimension of its weight that has one scale per entry."""
        return {**self._target.stored, **self._target.layers}[call.function]

    def module(self, call: Call) -> str:
        """Path of the module that owns the weight, else of the one that makes the call."""
        weighted = call.function in self._target.layers or call.function in self._target.stored
        if weighted and len(call.inputs) > 1:
            name = self.parameter(call.inputs[1])
            if name is not None:
                return name.rpartition(".")[0]
        return call.module

    def parameter(self, value: int) -> str | None:
        """The name of a value that is a parameter or buffer."""
        return self._graph.tensors[value].name

    def is_depthwise(self, call: Call) -> bool:
        """Whether every channel has one filter of its own."""
        data, weight = (self._graph.tensors[value].shape for value in call.inputs[:2])
        if not call.function.startswith("conv") or len(weight) < 3:
            return False
        return weight[1] == 1 and data[-len(weight) + 1] == weight[0]

    def data(self, call: Call) -> tuple[int, ...]:
        """The activations that ``call`` reads as integers."""
        if call.function in self._target.layers:
            return call.inputs[:1]
        if call.function in self._target.one_sided and len(call.inputs) == 2:
            for position in (1, 0):
                if self._added_inside(call.inputs[position]):
                    return (call.inputs[1 - position],)
        return call.inputs

    def root(self, value: int) -> int:
        """The value that was moved, sliced or reshaped into ``value``."""
        producer = self._graph.call_producer(value)
        while producer is not None and self._moves(producer):
            if not producer.inputs or producer.inputs[0] == value:
                break
            value = producer.inputs[0]
            producer = self._graph.call_producer(value)
        return value

    def _moves(self, call: Call) -> bool:
        """Whether the values it returns are those of its input, 0, or −∞ before a max pooling."""
        if call.function != "pad":
            return call.function in self._target.same_scale
        given = dict(zip(("pad", "mode", "value"), call.args[1:], strict=False)) | dict(call.kwargs)
        constant = given.get("mode", "constant") == "constant"
        added = given.get("value") or 0.0
        return "pad" in self._target.same_scale and (not constant or added in (0.0, -math.inf))

    def final(self, value: int) -> int:
        """The value behind the fused activation function, if one is all that reads ``value``."""
        reader = self.fused_reader(value)
        return value if reader is None else reader.outputs[0]

    def fused_reader(self, value: int) -> Call | None:
        """The activation function that is part of the operator that makes ``value``."""
        readers = self._graph.call_consumers(value)
        if len(readers) != 1 or value in self._graph.outputs:
            return None
        fused = readers[0].function in self._target.fused and len(readers[0].outputs) == 1
        return readers[0] if fused else None

    def _added_inside(self, value: int) -> bool:
        """Whether a layer makes ``value`` for one reader only."""
        producer = self._graph.call_producer(value)
        if producer is None or producer.function not in self._target.layers:
            return False
        alone = len(self._graph.call_consumers(value)) == 1 and value not in self._graph.outputs
        return alone and not self.is_skipped(producer)

    def _why_float_product(self, call: Call) -> str | None:
        if len(set(call.inputs)) != 2 or any(self.parameter(v) is not None for v in call.inputs):
            return "it does not multiply two activations"
        return None

    def _why_float_join(self, call: Call, integers: set[int]) -> str | None:
        if any(self.parameter(value) is not None for value in call.inputs):
            return "it takes a parameter"
        if len(set(call.inputs)) < (1 if call.function in _CONCATENATIONS else 2):
            return "it does not take two activations"
        if any(self.root(value) not in integers for value in call.inputs):
            return "an input does not come from an integer operation"
        return None

    def _why_float_unary(self, call: Call, integers: set[int]) -> str | None:
        pooled = call.function in self._target.pools
        if len(call.inputs) != 1 or (pooled and not self._over_space(call)):
            return "not a pooling over space" if pooled else "it does not take one activation"
        if self.root(call.inputs[0]) not in integers:
            return "its input does not come from an integer operation"
        return None

    def _over_space(self, call: Call) -> bool:
        """Whether it pools (N, C, H, W) over H and W."""
        rank = len(self._graph.tensors[call.inputs[0]].shape)
        if rank != 4 or call.function != "mean":
            return rank == 4
        ops = [op for op in self._graph.ops if op.call == call.index and op.name == "aten.mean.dim"]
        if len(ops) != 1:
            return False
        axes = ops[0].args[1] if len(ops[0].args) > 1 else ops[0].kwargs.get("dim")
        return isinstance(axes, tuple | list) and {int(axis) % 4 for axis in axes} == {2, 3}
