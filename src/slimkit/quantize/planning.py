"""From a captured graph to a quantization plan.

A value is rounded once, where it is made, and everything that reads it sees the rounded one.
It is rounded when an integer operator reads or makes it; behind an operator with a fused
activation function that is the value after the activation. Only values without a maker (the
network's inputs) are rounded where they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from slimkit.graph.capturing import Call, Graph
from slimkit.quantize.scheme import CallRule, Decision, QuantizerSpec
from slimkit.quantize.targets import NumberFormat, Target

__all__ = ["Layout", "lay_out"]

_HEAVY = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", "embedding"}
    | {"matmul", "mm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
    | {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
)
"""Worth a line in the explanation also when the target does not have them."""


@dataclass
class Layout:
    """The parts of a plan that depend on the network.

    Attributes:
        quantizers: in order of first use.
        calls: call address → what is rounded there.
        decisions: one per operation of interest.
    """

    quantizers: list[QuantizerSpec] = field(default_factory=list)
    calls: dict[str, CallRule] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)


def lay_out(
    graph: Graph,
    target: Target,
    *,
    granularity: str,
    skipped: Iterable[str],
    weight_bits: Mapping[str, int] | None = None,
) -> Layout:
    """Decide for every call whether it computes with integers, and place the quantizers.

    Args:
        graph: of the network with batch norms folded.
        target: what the runtime can do.
        granularity: ``"channel"`` or ``"tensor"``, for weights.
        skipped: paths of modules that stay in float.
        weight_bits: module path → bits of its weight, where they are not the target's.
    """
    return _Planner(graph, target, granularity, frozenset(skipped), weight_bits or {}).run()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        target: Target,
        granularity: str,
        skipped: frozenset[str],
        weight_bits: Mapping[str, int],
    ) -> None:
        self._graph = graph
        self._target = target
        self._per_channel = granularity == "channel"
        self._skipped = skipped
        self._weight_bits = weight_bits
        self._layout = Layout()
        self._names: set[str] = set()
        self._of_value: dict[int, str] = {}
        self._of_weight: dict[str, str] = {}
        self._integer_outputs: set[int] = set()
        self._decided: list[tuple[Decision, int]] = []
        self._unmade: set[int] = set()  # values that no call made: rounded where they are read

    def run(self) -> Layout:
        chosen: list[Call] = []
        for call in self._graph.calls:
            reason = self._why_float(call)
            if reason is None:
                chosen.append(call)
                self._integer_outputs.update(self._final(value) for value in call.outputs)
        wanted = {self._root(v) for call in chosen for v in self._data(call)}
        for call in chosen:
            if call.function not in self._target.float_outputs:
                wanted.update(self._final(value) for value in call.outputs)
        integer = {call.index for call in chosen}
        for call in self._graph.calls:
            reason = None if call.index in integer else self._why_float(call) or "not reached"
            self._place_outputs(call, wanted)
            if reason is None:
                self._place_inputs(call)
            self._decide(call, reason)
        # What rounds an output behind an activation function is known only now.
        self._layout.decisions = [
            replace(decision, writes=self._of_value.get(final)) for decision, final in self._decided
        ]
        return self._layout

    # --- what a call is -----------------------------------------------------------------

    def _why_float(self, call: Call) -> str | None:
        """Why ``call`` stays in float, ``None`` when it becomes integer."""
        target, function = self._target, call.function
        known = function in target.layers or function in target.joins or function in target.pools
        if not known:
            return f"{target.name} has no integer {function}"
        if self._module(call) in self._skipped or call.module in self._skipped:
            return "skipped by pattern"
        tensors = [self._graph.tensors[value] for value in (*call.inputs, *call.outputs)]
        if any(info.dtype != torch.float32 for info in tensors):
            return "not in 32-bit floating point"
        if function in target.layers:
            return self._why_float_layer(call)
        if function in target.joins:
            return self._why_float_join(call)
        return self._why_float_pool(call)

    def _why_float_layer(self, call: Call) -> str | None:
        if len(call.inputs) < 2 or self._parameter(call.inputs[1]) is None:
            return "its weight is computed, not a parameter"
        if self._parameter(call.inputs[0]) is not None:
            return "its input is a parameter"
        return None

    def _why_float_join(self, call: Call) -> str | None:
        if any(self._parameter(value) is not None for value in call.inputs):
            return "it takes a parameter"
        if len(set(call.inputs)) < (1 if call.function in ("cat", "concat") else 2):
            return "it does not take two activations"
        if any(self._root(value) not in self._integer_outputs for value in call.inputs):
            return "an input does not come from an integer operation"
        return None

    def _why_float_pool(self, call: Call) -> str | None:
        if len(call.inputs) != 1 or not self._over_space(call):
            return "not a pooling over space"
        if self._root(call.inputs[0]) not in self._integer_outputs:
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

    def _parameter(self, value: int) -> str | None:
        return self._graph.tensors[value].name

    def _module(self, call: Call) -> str:
        """Path of the module that owns the weight, else of the one that makes the call."""
        if call.function in self._target.layers and len(call.inputs) > 1:
            name = self._parameter(call.inputs[1])
            if name is not None:
                return name.rpartition(".")[0]
        return call.module

    def _data(self, call: Call) -> tuple[int, ...]:
        return call.inputs[:1] if call.function in self._target.layers else call.inputs

    # --- which value stands for which ---------------------------------------------------

    def _root(self, value: int) -> int:
        """The value that was moved, sliced or reshaped into ``value``."""
        producer = self._graph.call_producer(value)
        while producer is not None and producer.function in self._target.same_scale:
            if not producer.inputs or producer.inputs[0] == value:
                break
            value = producer.inputs[0]
            producer = self._graph.call_producer(value)
        return value

    def _final(self, value: int) -> int:
        """The value behind the fused activation function, if one is all that reads ``value``."""
        readers = self._graph.call_consumers(value)
        if len(readers) != 1 or value in self._graph.outputs:
            return value
        fused = readers[0].function in self._target.fused and len(readers[0].outputs) == 1
        return readers[0].outputs[0] if fused else value

    # --- placing ------------------------------------------------------------------------

    def _place_outputs(self, call: Call, wanted: set[int]) -> None:
        outputs = {}
        for position, value in enumerate(call.outputs):
            if value in wanted and value not in call.inputs and value not in self._of_value:
                suffix = f"{call.function}{call.ordinal or ''}"
                if self._graph.tensors[value].dtype == torch.float32:
                    outputs[position] = self._activation(value, f"{call.module}.{suffix}")
        self._rule(call, {}, outputs)

    def _place_inputs(self, call: Call) -> None:
        inputs = {}
        for position, value in enumerate(call.inputs):
            if position == 1 and call.function in self._target.layers:
                inputs[position] = self._weight(call)
            elif position == 0 or call.function not in self._target.layers:
                root = self._root(value)
                if root not in self._of_value:
                    self._activation(root, "input" if root in self._graph.inputs else "value")
                    self._unmade.add(root)
                if root in self._unmade:
                    inputs[position] = self._of_value[root]
        self._rule(call, inputs, {})

    def _rule(self, call: Call, inputs: dict[int, str], outputs: dict[int, str]) -> None:
        if inputs or outputs:
            before = self._layout.calls.get(call.address, CallRule({}, {}))
            self._layout.calls[call.address] = CallRule(
                {**before.inputs, **inputs}, {**before.outputs, **outputs}
            )

    def _activation(self, value: int, name: str) -> str:
        self._of_value[value] = self._fresh(name)
        spec = QuantizerSpec(self._of_value[value], self._target.activation)
        self._layout.quantizers.append(spec)
        return spec.name

    def _weight(self, call: Call) -> str:
        info = self._graph.tensors[call.inputs[1]]
        name = str(info.name)
        if name not in self._of_weight:
            axis = self._target.layers[call.function]
            self._of_weight[name] = self._fresh(name)
            self._layout.quantizers.append(
                QuantizerSpec(
                    self._of_weight[name],
                    self._weight_format(self._module(call)),
                    parameter=name,
                    channels=info.shape[axis] if self._per_channel else None,
                    axis=axis,
                    pairs=self._target.sums == "int16_pairs" and not self._is_depthwise(call),
                )
            )
        return self._of_weight[name]

    def _weight_format(self, module: str) -> NumberFormat:
        form = self._target.weight
        bits = self._weight_bits.get(module, form.bits)
        return form if bits == form.bits else replace(form, bits=bits)

    def _is_depthwise(self, call: Call) -> bool:
        """Whether every channel has one filter of its own."""
        data, weight = (self._graph.tensors[value].shape for value in call.inputs[:2])
        if not call.function.startswith("conv") or len(weight) < 3:
            return False
        return weight[1] == 1 and data[-len(weight) + 1] == weight[0]

    def _fresh(self, name: str) -> str:
        """A name without dots, as module names must be."""
        stem = re.sub(r"[^0-9A-Za-z_]", "_", name).strip("_")
        candidate, count = stem, 2
        while candidate in self._names:
            candidate, count = f"{stem}_{count}", count + 1
        self._names.add(candidate)
        return candidate

    def _decide(self, call: Call, reason: str | None) -> None:
        target = self._target
        weightless_join = call.function in target.joins and len(call.inputs) < 2
        of_interest = {*target.layers, *target.joins, *target.pools, *_HEAVY}
        if reason is not None and (call.function not in of_interest or weightless_join):
            return
        if reason is not None:
            decision = Decision(call.address, self._module(call), False, reason)
        else:
            reads = tuple(self._of_value[self._root(value)] for value in self._data(call))
            is_layer = call.function in target.layers
            weight = self._of_weight[str(self._parameter(call.inputs[1]))] if is_layer else None
            decision = Decision(call.address, self._module(call), True, "", reads, weight)
        final = self._final(call.outputs[0]) if len(call.outputs) == 1 else -1
        self._decided.append((decision, final))
