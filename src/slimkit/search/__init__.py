"""Black-box optimisation: one loop over a space, a sampler, hard constraints and an objective.

Read ``searching`` first, then ``parameters`` (the space), ``samplers`` and ``storage``.
"""

from __future__ import annotations

from slimkit.search.parameters import Choice, FloatRange, IntRange, Parameter
from slimkit.search.samplers import (
    SAMPLERS,
    AnnealingSampler,
    GeneticSampler,
    RandomSampler,
    Sampler,
    TPESampler,
)
from slimkit.search.searching import search
from slimkit.search.values import Candidate, Outcome, SearchError, SearchResult, Trial

__all__ = [
    "SAMPLERS",
    "AnnealingSampler",
    "Candidate",
    "Choice",
    "FloatRange",
    "GeneticSampler",
    "IntRange",
    "Outcome",
    "Parameter",
    "RandomSampler",
    "Sampler",
    "SearchError",
    "SearchResult",
    "TPESampler",
    "Trial",
    "search",
]
