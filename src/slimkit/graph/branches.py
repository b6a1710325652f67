"""Values behind a branch: tensors whose numbers decide what a forward does next.

An early exit (``if scores.max() > sure: return scores``), a loop that ends when something has
converged, samples that are picked by a mask: what is compared there are outputs such as class
scores, although none of them need be an output of the network in the example. Fewer of them
would be other decisions, so they stay.
"""

from __future__ import annotations

import torch

from slimkit.graph.captured import Graph, Op
from slimkit.graph.channels import rule_name

__all__ = ["deciding_values"]

_BY_MASK = frozenset({"aten.index", "aten.index_put", "aten.masked_select", "aten.nonzero"})
"""Operators whose result is as large as a mask has ones."""


def deciding_values(graph: Graph, mixing: frozenset[str] | set[str]) -> dict[int, str]:
    """Value number → why its channels stay, for all that a branch depends on.

    A backward slice from each tensor that Python read (``bool()``, ``item()``, ``tolist()``) or
    that picked elements as a mask. It ends at the layers that made the numbers: their outputs
    are part of it, their inputs are not.

    Args:
        graph: a capture.
        mixing: names of operators that add up over channels (convolutions, matrix products).
    """
    reasons: dict[int, str] = {}
    weights = _weights(graph)
    waiting = _read(graph)
    while waiting:
        module, value = waiting.pop()
        if value in reasons or value in weights:
            continue
        place = module or "the model itself"
        reasons[value] = f"a branch in {place} depends on them"
        op = graph.producer(value)
        if op is not None and not (rule_name(op) in mixing and _has_weight(op, weights)):
            waiting += [(module, source) for source in op.inputs]
    return reasons


def _read(graph: Graph) -> list[tuple[str, int]]:
    """(module path, value) of all that was read."""
    found = list(graph.read)
    for op in graph.ops:
        if torch.Tag.data_dependent_output in op.target.tags:
            found += [(op.module, value) for value in op.inputs]
        elif rule_name(op) in _BY_MASK:
            masks = [v for v in op.inputs if graph.tensors[v].dtype in (torch.bool, torch.uint8)]
            found += [(op.module, value) for value in masks]
    return found


def _weights(graph: Graph) -> set[int]:
    """Parameters, buffers, and what is computed from nothing else."""
    found = set(graph.parameters.values())
    for op in graph.ops:
        if op.inputs and found.issuperset(op.inputs):
            found.update(op.outputs)
    return found


def _has_weight(op: Op, weights: set[int]) -> bool:
    return any(value in weights for value in op.inputs)
