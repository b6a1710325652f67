"""Without calibration every layer is planned by itself: with scales of each batch, or none.

With ``mode="dynamic"`` the layers that the target computes so read integers whose scale comes from
the tensor at hand, and return floats. All other layers, and all of them with ``mode="weights"``,
only keep their weights as integers and compute in float.
"""

from __future__ import annotations

import torch

from slimkit.graph.capturing import Call, Graph
from slimkit.quantize.planning.drafting import Draft, Layout
from slimkit.quantize.planning.requests import Request
from slimkit.quantize.planning.roles import COMPILED, Roles
from slimkit.quantize.planning.static_scales import STORED
from slimkit.quantize.targets import Target

__all__ = ["plan_layers"]


def plan_layers(
    graph: Graph, target: Target, roles: Roles, draft: Draft, request: Request
) -> Layout:
    """Place the quantizers of weights, and of what dynamic layers read."""
    of_value: dict[int, str] = {}
    for call in graph.calls:
        reason = _why_float(graph, target, roles, call)
        if reason is not None:
            draft.decide(call, reason)
            continue
        if request.mode == "weights" or call.function not in target.dynamic:
            weight = draft.weight(call, pairs=False)
            draft.rule(call, {1: weight}, {})
            draft.decide(call, STORED, weight=weight)
            continue
        value = call.inputs[0]
        if value not in of_value:
            of_value[value] = draft.activation(f"{roles.module(call)}.input", dynamic=True)
        # Convolutions sum in 32 bits there: their kernel has the weights on the unsigned side.
        pairs = target.sums == "int16_pairs" and call.function == "linear"
        weight = draft.weight(call, pairs=pairs)
        draft.rule(call, {0: of_value[value], 1: weight}, {})
        draft.decide(call, None, reads=(of_value[value],), weight=weight)
    return draft.layout


def _why_float(graph: Graph, target: Target, roles: Roles, call: Call) -> str | None:
    if call.function not in {*target.layers, *target.stored}:
        return f"{target.name} keeps no integers for {call.function}"
    if roles.is_compiled(call):
        return COMPILED
    if roles.is_skipped(call):
        return "skipped by pattern"
    reason = roles.why_float_layer(call)
    if reason is None and graph.tensors[call.inputs[1]].dtype != torch.float32:
        return "not in 32-bit floating point"
    return reason
