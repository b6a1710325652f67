"""One capture of a model, and what can be read from it: addresses, folds, channel groups."""

from __future__ import annotations

from slimkit.graph.addressing import AddressMode
from slimkit.graph.capturing import Call, Graph, Op, Ref, TensorInfo, capture
from slimkit.graph.channels import rule
from slimkit.graph.equivalence import Equivalence, check_equivalence
from slimkit.graph.folding import FusePlan, batch_norm_pairs
from slimkit.graph.functions import function_name
from slimkit.graph.grouping import dependency_groups
from slimkit.graph.groups import Group, Slot
from slimkit.graph.masking import masked_outputs
from slimkit.graph.patterns import match_modules
from slimkit.graph.tracking import track
from slimkit.inputs import ExampleInputs, Inputs, as_inputs

__all__ = [
    "AddressMode",
    "Call",
    "Equivalence",
    "ExampleInputs",
    "FusePlan",
    "Graph",
    "Group",
    "Inputs",
    "Op",
    "Ref",
    "Slot",
    "TensorInfo",
    "as_inputs",
    "batch_norm_pairs",
    "capture",
    "check_equivalence",
    "dependency_groups",
    "function_name",
    "masked_outputs",
    "match_modules",
    "rule",
    "track",
]
