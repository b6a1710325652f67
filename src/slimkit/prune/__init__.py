"""Structured pruning: whole channels leave, tensors shrink, nothing else changes."""

from __future__ import annotations

from slimkit.prune.allocation import ALLOCATIONS, Allocation
from slimkit.prune.criteria import CRITERIA, Criterion
from slimkit.prune.edits import PrunePlan
from slimkit.prune.planning import plan

__all__ = ["ALLOCATIONS", "CRITERIA", "Allocation", "Criterion", "PrunePlan", "plan"]
