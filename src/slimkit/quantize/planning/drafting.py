"""The parts of a plan while they are collected: names, quantizers, rules, decisions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from slimkit.graph.capturing import Call, Graph
from slimkit.measure.macs import operator_costs
from slimkit.quantize.planning.requests import Request
from slimkit.quantize.planning.roles import Roles
from slimkit.quantize.specs import CallRule, Decision, QuantizerSpec
from slimkit.quantize.targets import Target

__all__ = ["Draft", "Layout"]

_GROUPED = ("linear", "conv1d", "conv2d", "conv3d")
_HEAVY = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear"}
    | {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "bilinear", "embedding"}
    | {"matmul", "mm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
    | {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
    | {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"}
)
"""Worth a line in the explanation also when the target does not have them."""


@dataclass
class Layout:
    """The parts of a plan that depend on the network.

    Attributes:
        quantizers: in order of first use.
        calls: call address → what is rounded there.
        decisions: one per operation of interest.
        warnings: one sentence each.
    """

    quantizers: list[QuantizerSpec] = field(default_factory=list)
    calls: dict[str, CallRule] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Draft:
    """Adds to a :class:`Layout`.

    Args:
        graph: of the network with batch norms folded.
        target: what the runtime can do.
        request: what the user asks for.
        roles: of the calls in ``graph``.
    """

    def __init__(self, graph: Graph, target: Target, request: Request, roles: Roles) -> None:
        self.layout = Layout()
        self._graph = graph
        self._target = target
        self._request = request
        self._roles = roles
        self._names: set[str] = set()
        self._of_weight: dict[str, str] = {}
        self._macs: Counter[int] = Counter()
        for cost in operator_costs(graph):
            self._macs[graph.ops[cost.op].call] += cost.macs

    def rule(
        self,
        call: Call,
        inputs: dict[int, str],
        outputs: dict[int, str],
        gate: str | None = None,
    ) -> None:
        """Round more at ``call``."""
        if inputs or outputs or gate:
            before = self.layout.calls.get(call.address, CallRule({}, {}))
            self.layout.calls[call.address] = CallRule(
                {**before.inputs, **inputs}, {**before.outputs, **outputs}, gate or before.gate
            )

    def activation(
        self, name: str, *, dynamic: bool = False, bounds: tuple[float, float] | None = None
    ) -> str:
        """A new quantizer of an activation; returns its name."""
        form = self._target.activation
        spec = QuantizerSpec(self._fresh(name), form, dynamic=dynamic, bounds=bounds)
        self.layout.quantizers.append(spec)
        return spec.name

    def unit_range(self, name: str) -> str:
        """A new quantizer of values in [0, 1), on a grid of powers of two."""
        levels = self._target.activation.qmax - self._target.activation.qmin
        return self.activation(name, bounds=(0.0, levels / (levels + 1)))

    def weight(self, call: Call, *, pairs: bool) -> str:
        """The quantizer of the weight of ``call``, a new one the first time.

        Args:
            call: a layer.
            pairs: see :class:`QuantizerSpec`.
        """
        name = str(self._roles.parameter(call.inputs[1]))
        quantizers = self.layout.quantizers
        if name not in self._of_weight:
            self._of_weight[name] = self._fresh(name)
            quantizers.append(self._weight_spec(call, name, pairs=pairs))
        elif pairs:  # an embedding that is also the last layer's weight
            position = [spec.name for spec in quantizers].index(self._of_weight[name])
            quantizers[position] = replace(quantizers[position], pairs=True)
        return self._of_weight[name]

    def decide(self, call: Call, reason: str | None, **parts: object) -> Decision | None:
        """Write down what becomes of ``call``: integer without ``reason``.

        Returns:
            ``None`` for a call that is not worth a line.
        """
        target = self._target
        weightless_join = call.function in target.joins and len(call.inputs) < 2
        of_interest = {*target.layers, *target.joins, *target.pools, *target.products, *_HEAVY}
        counts = self._macs[call.index] > 0 or call.function in of_interest | target.activations
        if (not counts or weightless_join) and reason is not None and not parts.get("weight"):
            return None
        decision = Decision(call.address, self._roles.module(call), reason is None, reason or "")
        decision = replace(decision, macs=self._macs[call.index], **parts)  # type: ignore[arg-type]
        self.layout.decisions.append(decision)
        return decision

    def _weight_spec(self, call: Call, name: str, *, pairs: bool) -> QuantizerSpec:
        shape, axis = self._graph.tensors[call.inputs[1]].shape, self._roles.axis(call)
        module = self._roles.module(call)
        bits = self._request.weight_bits.get(module, self._target.weight.bits)
        per_row = self._request.granularity != "tensor" or call.function == "embedding"
        return QuantizerSpec(
            self._of_weight[name],
            self._target.weight_format(bits),
            parameter=name,
            channels=shape[axis] if per_row else None,
            axis=axis,
            pairs=pairs,
            blocks=self._blocks(call, shape),
            compact=self._target.compact,
        )

    def _blocks(self, call: Call, shape: tuple[int, ...]) -> int | None:
        """How many groups the inputs of each output channel make."""
        size = self._request.group_size
        if size is None or call.function not in _GROUPED or any(k != 1 for k in shape[2:]):
            return None
        return shape[1] // size if shape[1] % size == 0 else None

    def _fresh(self, name: str) -> str:
        """A name without dots, as module names must be."""
        stem = re.sub(r"[^0-9A-Za-z_]", "_", name).strip("_")
        candidate, count = stem, 2
        while candidate in self._names:
            candidate, count = f"{stem}_{count}", count + 1
        self._names.add(candidate)
        return candidate
