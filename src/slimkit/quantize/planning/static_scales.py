"""Scales known beforehand: which values are rounded where, so that operators meet as integers.

A value is rounded once, where it is made, and everything that reads it sees the rounded one.
It is rounded when an integer operator reads or makes it; behind an operator with a fused
activation function that is the value after the activation. Only values without a maker (the
network's inputs) are rounded where they are read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimkit.graph.capturing import Call, Graph
from slimkit.quantize.integer.activations import GATES
from slimkit.quantize.planning.drafting import Draft, Layout
from slimkit.quantize.planning.roles import Roles
from slimkit.quantize.targets import Target

__all__ = ["plan_static"]

_CLIPPING = frozenset({"relu", "relu6", "hardtanh"})
_UNIT = frozenset({"sigmoid", "hardsigmoid"})
STORED = "its weight is kept as integers"


def plan_static(graph: Graph, target: Target, roles: Roles, draft: Draft) -> Layout:
    """Place all quantizers."""
    return _StaticPlanner(graph, target, roles, draft).run()


class _StaticPlanner:
    def __init__(self, graph: Graph, target: Target, roles: Roles, draft: Draft) -> None:
        self._graph = graph
        self._target = target
        self._roles = roles
        self._draft = draft
        self._reasons: dict[int, str] = {}  # index of a call that stays in float → why
        self._shares: dict[int, int] = {}  # value → another one with the same scale
        self._of_value: dict[int, str] = {}  # value that stands for all that share → quantizer
        self._placed: set[int] = set()
        self._unmade: set[int] = set()  # values that no call made: rounded where they are read

    def run(self) -> Layout:
        chosen = self._drop_unread(self._choose())
        wanted = self._read_by(chosen)
        for call in chosen:
            if call.function in self._target.shared:
                self._share(call)
            if call.function not in self._target.float_outputs:
                wanted.update(self._roles.final(value) for value in call.outputs)
        integer = {call.index for call in chosen}
        decided = []
        for call in self._graph.calls:
            self._place_outputs(call, wanted, integer=call.index in integer)
            if call.index in integer:
                decided.append((self._place_inputs(call), call))
            else:
                self._place_float(call)
        # What rounds an output behind an activation function is known only now.
        writes = {position: self._writes(call) for position, call in decided}
        self._draft.layout.decisions = [
            replace(decision, writes=writes.get(position))
            for position, decision in enumerate(self._draft.layout.decisions)
        ]
        return self._draft.layout

    # --- which calls -------------------------------------------------------------------

    def _choose(self) -> list[Call]:
        chosen: list[Call] = []
        integers: set[int] = set()
        for call in self._graph.calls:
            reason = self._roles.why_float(call, integers)
            if reason is not None:
                self._reasons[call.index] = reason
                continue
            chosen.append(call)
            integers.update(self._roles.final(value) for value in call.outputs)
        return chosen

    def _drop_unread(self, chosen: list[Call]) -> list[Call]:
        """Without activation functions that no integer operator reads: they only lose digits."""
        while True:
            wanted = self._read_by(chosen)
            unread = {
                call.index
                for call in chosen
                if call.function in self._target.activations and not wanted & set(call.outputs)
            }
            if not unread:
                return chosen
            self._reasons.update(dict.fromkeys(unread, "no integer operation reads it"))
            chosen = [call for call in chosen if call.index not in unread]

    def _read_by(self, chosen: list[Call]) -> set[int]:
        return {self._roles.root(v) for call in chosen for v in self._roles.data(call)}

    # --- which values share a scale ------------------------------------------------------

    def _share(self, call: Call) -> None:
        """One scale for everything that ``call`` reads and makes."""
        roots = [self._roles.root(value) for value in call.inputs]
        first, *others = (*roots, *(self._roles.final(value) for value in call.outputs))
        for other in others:
            if self._stands_for(other) != self._stands_for(first):
                self._shares[self._stands_for(other)] = self._stands_for(first)

    def _stands_for(self, value: int) -> int:
        while value in self._shares:
            value = self._shares[value]
        return value

    def _name(self, value: int) -> str | None:
        return self._of_value.get(self._stands_for(value))

    # --- placing -------------------------------------------------------------------------

    def _place_outputs(self, call: Call, wanted: set[int], *, integer: bool) -> None:
        if self._roles.is_compiled(call):
            return
        outputs = {}
        for position, value in enumerate(call.outputs):
            new = value in wanted and value not in call.inputs and value not in self._placed
            if new and self._graph.tensors[value].dtype == torch.float32:
                suffix = f"{call.function}{call.ordinal or ''}"
                unit = integer and call.function in _UNIT
                outputs[position] = self._activation(value, f"{call.module}.{suffix}", unit=unit)
        self._draft.rule(call, {}, outputs)

    def _activation(self, value: int, name: str, *, unit: bool = False) -> str:
        self._placed.add(value)
        key = self._stands_for(value)
        if key not in self._of_value:
            alone = key == value and value not in self._shares.values()
            place = self._draft.unit_range if unit and alone else self._draft.activation
            self._of_value[key] = place(name)
        return self._of_value[key]

    def _place_inputs(self, call: Call) -> int:
        """Round what ``call`` reads; returns the position of its decision."""
        is_layer = call.function in self._target.layers
        data, inputs = self._roles.data(call), {}
        for position, value in enumerate(call.inputs):
            root = self._roles.root(value)
            if value in data and not (is_layer and position):
                if root not in self._placed:
                    self._activation(root, "input" if root in self._graph.inputs else "value")
                    self._unmade.add(root)
                if root in self._unmade:
                    inputs[position] = str(self._name(root))
        weight = gate = None
        if is_layer:
            pairs = self._target.sums == "int16_pairs" and not self._roles.is_depthwise(call)
            weight = inputs[1] = self._draft.weight(call, pairs=pairs)
        if call.function in GATES:
            gate = self._draft.unit_range(f"{call.module}.{call.function}{call.ordinal or ''}_gate")
        self._draft.rule(call, inputs, {}, gate)
        reads = tuple(str(self._name(self._roles.root(value))) for value in data)
        self._draft.decide(call, None, reads=reads, weight=weight)
        return len(self._draft.layout.decisions) - 1

    def _place_float(self, call: Call) -> None:
        reason, weight = self._reasons[call.index], None
        if call.function in self._target.stored and self._roles.keeps_integers(call):
            reason, weight = STORED, self._draft.weight(call, pairs=False)
            self._draft.rule(call, {1: weight}, {})
        self._draft.decide(call, reason, weight=weight)

    def _writes(self, call: Call) -> str | None:
        if len(call.outputs) != 1:
            return None
        reader = self._roles.fused_reader(call.outputs[0])
        if reader is not None and reader.function not in _CLIPPING:
            return None  # a curve comes between the sums and the rounding
        return self._name(self._roles.final(call.outputs[0]))
