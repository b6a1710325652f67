"""Structured pruning: whole channels leave, tensors shrink, nothing else changes."""

from __future__ import annotations

from slimkit.prune.allocation.curves import SensitivityCurves, merge_sensitivities
from slimkit.prune.allocation.evolution import Annealing, Genetic, evolve
from slimkit.prune.allocation.ranking import (
    ALLOCATIONS,
    Allocation,
    GivenRatios,
    GlobalRanking,
    IsomorphicRanking,
)
from slimkit.prune.allocation.sensitivity import Sensitivity, measure_sensitivity
from slimkit.prune.criteria.fisher import GroupFisher
from slimkit.prune.criteria.gradients import OBD, Taylor
from slimkit.prune.criteria.scores import (
    CRITERIA,
    FPGM,
    BatchNormScale,
    Criterion,
    FixedScores,
    Magnitude,
    Normalised,
    Random,
)
from slimkit.prune.edits import PrunePlan
from slimkit.prune.fisher_pruning import one_by_one
from slimkit.prune.iterative import iterate
from slimkit.prune.planning import plan, space
from slimkit.prune.prune_space import PruneSpace
from slimkit.prune.sparse_training import BatchNormL1, GroupLasso
from slimkit.prune.targets import RemovalTarget

__all__ = [
    "ALLOCATIONS",
    "CRITERIA",
    "FPGM",
    "OBD",
    "Allocation",
    "Annealing",
    "BatchNormL1",
    "BatchNormScale",
    "Criterion",
    "FixedScores",
    "Genetic",
    "GivenRatios",
    "GlobalRanking",
    "GroupFisher",
    "GroupLasso",
    "IsomorphicRanking",
    "Magnitude",
    "Normalised",
    "PrunePlan",
    "PruneSpace",
    "Random",
    "RemovalTarget",
    "Sensitivity",
    "SensitivityCurves",
    "Taylor",
    "evolve",
    "iterate",
    "measure_sensitivity",
    "merge_sensitivities",
    "one_by_one",
    "plan",
    "space",
]

ALLOCATIONS.register("sensitivity")(Sensitivity())
ALLOCATIONS.register("annealing")(Annealing())
ALLOCATIONS.register("genetic")(Genetic())
