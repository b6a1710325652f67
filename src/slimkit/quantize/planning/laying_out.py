"""From a captured graph to a quantization plan."""

from __future__ import annotations

from collections.abc import Iterable

from slimkit.graph.capturing import Graph
from slimkit.quantize.planning.drafting import Draft, Layout
from slimkit.quantize.planning.layer_by_layer import plan_layers
from slimkit.quantize.planning.requests import Request
from slimkit.quantize.planning.roles import Roles
from slimkit.quantize.planning.static_scales import plan_static
from slimkit.quantize.targets import Target

__all__ = ["lay_out"]


def lay_out(
    graph: Graph,
    target: Target,
    request: Request,
    *,
    skipped: Iterable[str],
    compiled: Iterable[str] = (),
) -> Layout:
    """Decide for every call whether it computes with integers, and place the quantizers.

    Args:
        graph: of the network with batch norms folded.
        target: what the runtime can do.
        request: what the user asks for, checked.
        skipped: paths of modules that stay in float.
        compiled: paths of modules of TorchScript: nothing inside can be rounded.
    """
    roles = Roles(graph, target, skipped, compiled)
    draft = Draft(graph, target, request, roles)
    if request.mode == "static":
        return plan_static(graph, target, roles, draft)
    return plan_layers(graph, target, roles, draft, request)
