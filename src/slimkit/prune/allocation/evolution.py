"""Allocations found by evolution: simulated annealing (PaddleSlim's way) and a genetic search.

A candidate is one removal ratio per unit. It is scaled until it meets the target, which is the
hard constraint, and the network pruned that way is evaluated. The search begins with uniform
ratios, so that on its own metric it never ends worse than they do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.outside import called
from slimkit.prune.allocation.curves import SensitivityCurves, by_fraction
from slimkit.prune.allocation.ranking import ALLOCATIONS, Allocation, uniform
from slimkit.prune.targets import RemovalTarget
from slimkit.search import (
    AnnealingSampler,
    FloatRange,
    GeneticSampler,
    Sampler,
    SearchError,
    SearchResult,
    search,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from slimkit.prune.prune_space import Proposal, PruneSpace
    from slimkit.search.parameters import Parameters

__all__ = [
    "Annealing",
    "Evolution",
    "EvolutionaryAllocation",
    "Genetic",
    "Recover",
    "evolve",
]

Recover = Callable[[nn.Module], object]
"""Changes a pruned network in place before it is evaluated; what it returns is not used."""


@dataclass(frozen=True)
class EvolutionaryAllocation(ABC):
    """A search over one removal ratio per unit; what :class:`Annealing` and :class:`Genetic` share.

    Needs ``evaluate``, which is called once per trial. With a latency target candidates are
    compared at equal MACs, and the best one is then fitted to the latency.

    Attributes:
        trials: networks that are evaluated, those of an earlier run in ``storage`` included.
        seed: of everything random.
        storage: journal that records every trial and from which a killed search goes on.
        start: allocations (or their names) that are tried first, after uniform.
        recover: called with every pruned network before it is evaluated, for example to
            re-estimate its batch-norm statistics.
        width: how far a ratio moves at most, as part of what a unit can lose.
        max_failures: evaluations that may fail before the search gives up.
    """

    trials: int = 100
    seed: int = 0
    storage: PathLike | None = field(default=None, repr=False)  # a place, no part of the method
    start: str | Allocation | Sequence[str | Allocation] = ()
    recover: Recover | None = None
    width: float = 1.0
    max_failures: int = 10

    @abstractmethod
    def sampler(self) -> Sampler:
        """Where the next candidate comes from."""

    def __call__(self, space: PruneSpace, target: RemovalTarget) -> Proposal:
        """Search, and propose the best candidate."""
        return evolve(
            space,
            target,
            self.sampler(),
            trials=self.trials,
            seed=self.seed,
            storage=self.storage,
            start=self.start,
            recover=self.recover,
            max_failures=self.max_failures,
            progress=space.progress,
        ).proposal


@door
@dataclass(frozen=True)
class Annealing(EvolutionaryAllocation):
    """Simulated annealing, as PaddleSlim's automatic pruner; see :class:`EvolutionaryAllocation`.

    Attributes:
        temperature: at the start, in units of the range of the metric so far.
        decay: factor on the temperature per trial.
    """

    temperature: float = 0.1
    decay: float = 0.85

    def sampler(self) -> Sampler:
        """A neighbour of the current network, which may replace it though it is worse."""
        return AnnealingSampler(self.temperature, self.decay, width=self.width)


@door
@dataclass(frozen=True)
class Genetic(EvolutionaryAllocation):
    """A genetic search; see :class:`EvolutionaryAllocation`.

    The population grows from the allocations it starts from; see
    :class:`~slimkit.search.samplers.GeneticSampler`.

    Attributes:
        population: the best networks, from which new ones descend.
        tournament: members drawn per parent, of which the best wins.
        crossover: probability of two parents.
        mutation: probability that a ratio changes; None for one per network on average.
    """

    population: int = 20
    tournament: int = 3
    crossover: float = 0.9
    mutation: float | None = None

    def sampler(self) -> Sampler:
        """A child of two of the best networks."""
        return GeneticSampler(
            self.population, self.tournament, self.crossover, self.mutation, self.width, random=0
        )


@dataclass(frozen=True)
class Evolution:
    """What a search over ratios found.

    Attributes:
        result: all trials; the value of one is the metric of its network.
        kept: group name → channels of the best network.
        proposal: the family that :meth:`~slimkit.prune.prune_space.PruneSpace.fit` turns into it.
    """

    result: SearchResult
    kept: Mapping[str, int]
    proposal: Proposal


@door
def evolve(
    space: PruneSpace,
    target: RemovalTarget,
    sampler: str | Sampler = "genetic",
    *,
    trials: int = 100,
    seed: int = 0,
    storage: PathLike | None = None,
    start: str | Allocation | Sequence[str | Allocation] = (),
    recover: Recover | None = None,
    max_failures: int = 10,
    progress: bool = True,
) -> Evolution:
    """Search the ratios of all units with any sampler.

    Args:
        space: of :func:`slimkit.prune.prune_space`, with ``evaluate``.
        target: what every candidate is scaled to.
        sampler: a name or a :class:`~slimkit.search.samplers.Sampler`.
        trials: networks that are evaluated.
        seed: of everything random.
        storage: journal to record in and to resume from.
        start: allocations or their names, tried after uniform.
        recover: see :class:`EvolutionaryAllocation`.
        max_failures: evaluations that may fail.
        progress: show progress on standard error.

    Raises:
        InputError: an argument is wrong, the space has no ``evaluate``, or ``storage`` belongs
            to another search or network (says where it differs).
        PlanError: the target is out of reach, or too many evaluations failed.
        ArtifactError: ``storage`` cannot be read or written.
    """
    evaluate = space.evaluate
    if evaluate is None:
        raise InputError(
            "networks are compared with it",
            where="evaluate",
            hint="evaluate=fn, model → accuracy on training or validation data",
        )
    candidates = _Candidates(space, _deterministic(target))
    first = [start] if isinstance(start, str) or callable(start) else start
    allocations = [ALLOCATIONS.get(a, where="start") if isinstance(a, str) else a for a in first]
    points = [candidates.remembered(allocate) for allocate in (uniform, *allocations)]
    points = list({tuple(point.values()): point for point in points}.values())
    known: dict[tuple[int, ...], float] = {}

    def value(parameters: Parameters, _candidate: object) -> float:
        kept = candidates.kept(parameters)
        counts = tuple(kept.values())
        if counts not in known:
            model = space.pruned(kept)
            if recover is not None:
                recover(model)
            known[counts] = evaluate(model.eval())
        return known[counts]

    try:
        result = search(
            candidates.ranges,
            value,
            trials=trials,
            sampler=sampler,
            start=points,
            key=lambda parameters: tuple(candidates.kept(parameters).values()),
            storage=storage,
            identity=_identity(space, target, recover),
            seed=seed,
            max_failures=max_failures,
            retries=100,  # where hardly any network is new, an old one is not evaluated again
            progress=progress,
            label="evolution",
        )
        best = result.best.parameters
    except SearchError as error:
        raise PlanError(error.message, where=error.where, hint=error.hint) from error
    return Evolution(result, candidates.kept(best), candidates.proposal(best, target))


class _Candidates:
    """Vectors of ratios, and the channels that a network keeps when they are scaled to a target."""

    def __init__(self, space: PruneSpace, target: RemovalTarget) -> None:
        self.space, self.target = space, target
        self.most = {unit.name: 1.0 - unit.counts[0] / unit.size for unit in space.units}
        self.ranges = {name: FloatRange(0.0, most) for name, most in self.most.items()}
        self._kept: dict[tuple[Any, ...], dict[str, int]] = {}

    def remembered(self, allocate: Allocation) -> dict[str, float]:
        """The ratios of an allocation that meets the target; they stand for its exact counts."""
        kept = self._fitted(called(allocate, InputError, "start", self.space, self.target))
        point = {unit.name: 1.0 - kept[unit.name] / unit.size for unit in self.space.units}
        self._kept[tuple(point.values())] = kept
        return point

    def kept(self, parameters: Parameters) -> dict[str, int]:
        """Channels by group."""
        key = tuple(parameters.values())
        if key not in self._kept:
            self._kept[key] = self._fitted(self.family(parameters))
        return self._kept[key]

    def _fitted(self, proposal: Proposal) -> dict[str, int]:
        """The counts of a family that meet the target: no candidate is evaluated that does not."""
        if self.target.kind != "ratio":
            return self.space.fit(proposal, self.target)
        # Rounded ratios could leave more channels than uniform ones, which would be no contest.
        limit = sum(self.space.fit(uniform(self.space, self.target), self.target).values())
        kept = self.space.fit_cost(proposal, lambda counts: sum(counts.values()), limit)
        if kept is None:
            raise self.space.out_of_reach(self.target)
        return kept

    def family(self, parameters: Parameters) -> Proposal:
        """Ratios in the proportions of ``parameters``, each up to the most its unit can lose."""
        weights = {name: float(str(value)) for name, value in parameters.items()}
        ends = [self.most[name] / weight for name, weight in weights.items() if weight > 1e-6]

        def ratios_at(scales: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
            return {
                name: np.minimum(
                    weight * scales if weight > 1e-6 else 0.0 * scales, self.most[name]
                )
                for name, weight in weights.items()
            }

        return by_fraction(self.space, ratios_at, np.unique([0.0, *ends]))

    def proposal(self, parameters: Parameters, target: RemovalTarget) -> Proposal:
        """What ends at exactly the counts of ``parameters`` when it is fitted to the target."""
        if target != self.target:
            return self.family(parameters)
        kept = self.kept(parameters)
        whole = {group.name: group.size for group in self.space.groups}
        if target.kind == "ratio":
            return lambda _fraction: kept
        return lambda fraction: whole if fraction < 0.5 else kept


def _deterministic(target: RemovalTarget) -> RemovalTarget:
    """What candidates are scaled to: not to a measured time, which is another each time."""
    return RemovalTarget("macs", target.fraction) if target.kind == "latency" else target


def _identity(space: PruneSpace, target: RemovalTarget, recover: Recover | None) -> dict[str, Any]:
    """Weights, target, recovery and units of a search: a journal with others is refused."""
    curves = SensitivityCurves.of(space).to_json()
    return {
        "weights": curves["weights"],
        "target": str(target),
        "recover": None if recover is None else getattr(recover, "__name__", str(type(recover))),
        "units": {
            unit.name: {"order": curves["units"][unit.name]["order"], "counts": unit.counts}
            for unit in space.units
        },
    }
