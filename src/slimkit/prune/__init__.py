"""Structured pruning: whole channels leave, tensors shrink, nothing else changes."""

from __future__ import annotations

from slimkit.prune.allocation import ALLOCATIONS, Allocation, GlobalRanking, IsomorphicRanking
from slimkit.prune.criteria import CRITERIA, Criterion
from slimkit.prune.edits import PrunePlan
from slimkit.prune.planning import plan, space
from slimkit.prune.space import PruneSpace

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "Allocation",
    "Criterion",
    "GlobalRanking",
    "IsomorphicRanking",
    "PrunePlan",
    "PruneSpace",
    "plan",
    "space",
]
