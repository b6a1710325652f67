"""Structured pruning: whole channels leave, tensors shrink, nothing else changes."""

from __future__ import annotations

from slimkit.prune.allocation import (
    ALLOCATIONS,
    Allocation,
    GivenRatios,
    GlobalRanking,
    IsomorphicRanking,
)
from slimkit.prune.criteria import (
    CRITERIA,
    FPGM,
    BatchNormScale,
    Criterion,
    FixedScores,
    Magnitude,
    Normalised,
    Random,
)
from slimkit.prune.curves import SensitivityCurves, merge_sensitivities
from slimkit.prune.edits import PrunePlan
from slimkit.prune.evolution import Annealing, Genetic, evolve
from slimkit.prune.fisher import GroupFisher
from slimkit.prune.fisher_pruning import one_by_one
from slimkit.prune.gradients import OBD, Taylor
from slimkit.prune.iterative import iterate
from slimkit.prune.planning import plan, space
from slimkit.prune.sensitivity import Sensitivity, measure_sensitivity
from slimkit.prune.space import PruneSpace
from slimkit.prune.sparse_training import BatchNormL1, GroupLasso
from slimkit.prune.targets import Target

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
    "Sensitivity",
    "SensitivityCurves",
    "Target",
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
