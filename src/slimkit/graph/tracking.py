"""The pass of rules over a captured model, repeated where a choice turned out to be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd

from slimkit.doors import structure_door
from slimkit.graph import rules, rules_join, rules_norm, rules_view  # noqa: F401 - they fill RULES
from slimkit.graph.branches import deciding_values
from slimkit.graph.capturing import Graph
from slimkit.graph.channels import ChannelTracker, SplitChoice, SplitKind, rule_name
from slimkit.graph.components import components
from slimkit.graph.groups import AttentionPart

__all__ = ["track"]

_ATTENDING = ("softmax", "scaled_dot_product")
_ROUNDS = 8
"""Other choices that are tried at most; each repeats the pass over the whole graph."""


@structure_door
def track(
    graph: Graph,
    model: nn.Module,
    attention: AttentionPart | None = None,
    protected: Mapping[int, str] | None = None,
) -> ChannelTracker:
    """Run all rules over the graph of a model.

    Where channels are split into heads × channels per head, either could shrink. If the first
    choice turns out to be impossible (its size meets one that cannot change), the pass is
    repeated with the other, for all modules of that class at once.

    Args:
        graph: a capture of ``model``.
        model: the captured model.
        attention: the first choice in modules that compute attention; None takes what the
            model's code follows best.
        protected: value number → why its channels stay; see
            :func:`~slimkit.graph.unseen.protected_values`.
    """
    whole = {**deciding_values(graph, rules.MIXING), **(protected or {})}
    adjustable = frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, _ConvNd)
        or (isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None)
    )
    kernels = frozenset(
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, _ConvNd)
    )
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    attending = {op.module for op in graph.ops if any(a in rule_name(op) for a in _ATTENDING)}
    heads = dict.fromkeys(attending, attention == "heads") if attention else {}

    def run(
        avoided: Mapping[SplitKind, frozenset[int]],
    ) -> tuple[ChannelTracker, list[SplitChoice]]:
        tracker = ChannelTracker(graph, adjustable, kernels, classes, avoided, heads, whole)
        tracker.run()
        if not tracker.choices:
            return tracker, []
        found = components(tracker)
        return tracker, [c for c in tracker.choices.values() if found.stuck(c.atoms)]

    avoided: dict[SplitKind, frozenset[int]] = {}
    tracker, stuck = run(avoided)
    tried: set[frozenset[tuple[SplitKind, int]]] = set()
    for _ in range(_ROUNDS):
        flips = next((f for f in _flips(stuck) if f not in tried), None)
        if flips is None:
            break
        tried.add(flips)
        other = dict(avoided)
        for kind, axis in flips:
            other[kind] = other.get(kind, frozenset()) | {axis}
        second, second_stuck = run(other)
        if len(second_stuck) < len(stuck):
            avoided, tracker, stuck = other, second, second_stuck
    return tracker


def _flips(stuck: Sequence[SplitChoice]) -> list[frozenset[tuple[SplitKind, int]]]:
    """Choices to make otherwise: all that are stuck, those of each class of module, each alone."""
    able = [(choice.kind, choice.axis) for choice in stuck if choice.others]
    classes = dict.fromkeys(kind[0] for kind, _ in able)
    sets = [frozenset(able)]
    sets += [frozenset(flip for flip in able if flip[0][0] == name) for name in classes]
    sets += [frozenset([flip]) for flip in dict.fromkeys(able)]
    return [flips for flips in dict.fromkeys(sets) if flips]
