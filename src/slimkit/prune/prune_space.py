"""What an allocation may choose from: the prunable groups of one network, with scores and costs.

Groups whose sizes depend on each other (the width of a transformer and the number of its heads,
see :attr:`slimkit.graph.groups.Group.link`) form one *unit* and always keep equal fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.errors import PlanError, SlimkitError
from slimkit.modules import Evaluate, copy_module
from slimkit.prune.costing import Cost, CostModel
from slimkit.prune.fitting import fit_counts, rounded
from slimkit.prune.writing import write_plan

if TYPE_CHECKING:
    from slimkit.graph.capturing import Graph
    from slimkit.graph.groups import Group
    from slimkit.inputs import Inputs
    from slimkit.prune.edits import PrunePlan
    from slimkit.prune.targets import RemovalTarget

__all__ = ["Counts", "Proposal", "PruneSpace", "Unit", "checked_evaluation"]

Counts = Mapping[str, float]
"""Group name → channels kept; in a proposal they may be fractional."""

Proposal = Callable[[float], Counts]
"""Fraction to remove, 0 … 1 → wanted counts, which do not grow with the fraction."""


_CLOSE = 1e-9
"""Fractions that differ by less are equal: they come from divisions of whole numbers."""


@dataclass(frozen=True)
class Unit:
    """Groups that keep equal fractions: most often one alone.

    Attributes:
        name: of its largest group.
        size: channels of that group.
        groups: names of all its groups.
        levels: what the groups may keep together, ascending: one count per group.
    """

    name: str
    size: int
    groups: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[int]:
        """Channels of the largest group at each level, ascending."""
        lead = self.groups.index(self.name)
        return [level[lead] for level in self.levels]


@dataclass(frozen=True, eq=False)
class PruneSpace:
    """The choices that a network leaves.

    Attributes:
        model: the unpruned network; not to be changed.
        inputs: example inputs.
        graph: its capture in evaluation mode, which counts for costs.
        both: the same with what only training mode runs.
        all_groups: every group, frozen ones too.
        groups: the groups that can lose channels.
        scores: group name → ``(size,)`` float64, higher = keep.
        allowed: group name → numbers of channels that it may keep, ascending; the last is all
            of them unless the user limits it.
        reasons: name of every other group → why it stays whole.
        settings: how the plan is made; written into it.
        evaluate: how good a network is, or None if the caller gave nothing.
        measuring: settings of a latency target (backend, threads, deployed).
        progress: show on standard error how long work goes on.
    """

    model: nn.Module
    inputs: Inputs
    graph: Graph
    both: Graph
    all_groups: Sequence[Group]
    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    allowed: Mapping[str, Sequence[int]]
    reasons: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Evaluate | None = None
    measuring: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Sets of linked groups, each of which shrinks independently of the others."""
        return units_of(self.groups, self.allowed)

    @cached_property
    def costs(self) -> CostModel:
        """MACs and parameters as a function of the counts."""
        return CostModel(self.graph, self.model, self.groups)

    def cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        """MACs and parameters when groups keep so many channels, the others all."""
        return self.costs.cost(kept)

    def legal(self, wanted: Counts) -> dict[str, int]:
        """The allowed counts nearest to ``wanted``, equal fractions within a unit."""
        lead = {unit.name: rounded(self._lead(unit, wanted), unit.counts) for unit in self.units}
        return self._expanded(lead)

    def fit(self, proposal: Proposal, target: RemovalTarget) -> dict[str, int]:
        """The counts of the family ``proposal`` that reach the target and hardly more.

        Args:
            proposal: fraction → wanted counts.
            target: a cost is reached exactly or exceeded by what rounding needs; a ratio is
                the fraction itself, rounded, and as near as can be where it is out of reach,
                which the plan's warnings say; latency is measured.

        Raises:
            PlanError: a cost is out of reach; says how far one can go and what limits.
        """
        if target.kind == "ratio":
            return self._fit_ratio(proposal, target)
        if target.kind == "latency":
            from slimkit.prune.latency_target import fit_latency

            return fit_latency(self, proposal, target)
        whole = self._cost_of(target.kind, {})
        kept = self.fit_cost(
            proposal,
            lambda counts: self._cost_of(target.kind, counts),
            (1.0 - target.fraction) * whole,
        )
        if kept is None:
            raise self.out_of_reach(target)
        return kept

    def _fit_ratio(self, proposal: Proposal, target: RemovalTarget) -> dict[str, int]:
        """The proposal rounded; a note where the smallest allowed counts leave too much."""
        kept = self.legal(proposal(target.fraction))
        total = sum(self._sizes.values())
        most = 1.0 - sum(self.fewest().values()) / total
        if most < target.fraction - _CLOSE:
            gone = 1.0 - sum(kept.values()) / total
            text = (
                f"{target} is out of reach: {gone:.3f} of the channels go, and with "
                f"round_to={self.settings.get('round_to', 1)} at most {most:.3f} could"
            )
            self.note(kept, {"warnings": [text]})
        return kept

    def fit_cost(
        self, proposal: Proposal, cost: Callable[[Mapping[str, int]], float], limit: float
    ) -> dict[str, int] | None:
        """Like :meth:`fit` for any cost that falls with the counts; None if out of reach."""
        worth = self._worth

        def value(name: str, fewer: int, more: int) -> float:
            unit = self._unit[name]
            low, high = self._levels[name][fewer], self._levels[name][more]
            return sum(
                worth[group][b] - worth[group][a]
                for group, a, b in zip(unit.groups, low, high, strict=True)
            )

        def wanted(fraction: float) -> dict[str, float]:
            counts = proposal(fraction)
            return {unit.name: self._lead(unit, counts) for unit in self.units}

        lead = fit_counts(
            wanted,
            {unit.name: unit.counts for unit in self.units},
            lambda counts: cost(self._expanded(counts)),
            value,
            limit,
        )
        return None if lead is None else self._expanded(lead)

    def whole(self) -> dict[str, int]:
        """The counts of the unpruned network."""
        return {group.name: group.size for group in self.groups}

    def fewest(self) -> dict[str, int]:
        """The smallest counts that are allowed."""
        return self._expanded({unit.name: unit.counts[0] for unit in self.units})

    def key(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        """The counts in the order of :attr:`groups`, to look something up by."""
        return tuple(kept[group.name] for group in self.groups)

    def note(self, kept: Mapping[str, int], facts: Mapping[str, Any]) -> None:
        """Remember what was measured with these counts: their plan's settings will say it."""
        self._notes[self.key(kept)] = facts

    def channels(self, kept: Mapping[str, int]) -> dict[str, list[int]]:
        """Group name → the channels that stay: those with the highest scores."""
        return {g.name: _best(self.scores[g.name], kept[g.name]) for g in self.groups}

    def plan(self, kept: Mapping[str, int]) -> PrunePlan:
        """The plan in which every group keeps its best channels.

        Args:
            kept: group name → channels kept, for every group of :attr:`groups`.
        """
        reasons = dict(self.reasons)
        for group in self.groups:
            if kept[group.name] == group.size:
                reasons[group.name] = (
                    f"rounded up to a multiple of {self.settings.get('round_to', 1)}"
                    if "ratio" in self.settings
                    else "the target is met without it"
                )
        return write_plan(
            self.model,
            self.both,
            self.all_groups,
            self.channels(kept),
            reasons,
            costs=(self.cost(), self.cost(kept)),
            settings=self._settings(kept),
        )

    def pruned(self, kept: Mapping[str, int]) -> nn.Module:
        """A pruned copy of the network, in evaluation mode."""
        return self.plan(kept).apply_to(copy_module(self.model)).eval()

    def out_of_reach(self, target: RemovalTarget) -> PlanError:
        """The error that says how far one can go and which groups limit it."""
        least = self.fewest()
        kind = "macs" if target.kind == "ratio" else target.kind
        whole, left = self._cost_of(kind, {}), self._cost_of(kind, least)
        # What the network would still lose if a group could go entirely: the limiting groups.
        gains = {name: left - self._cost_of(kind, {**least, name: 0}) for name in least}
        worst = sorted(gains, key=lambda name: -gains[name])[:3]
        limits = ", ".join(f"{name} (keeps {least[name]})" for name in worst)
        return PlanError(
            f"{target} is out of reach: at most {1 - left / whole:.3f} can go, limited by "
            f"{limits} and by what cannot be pruned",
            where=target.kind,
            hint="lower round_to or min_channels, ignore fewer layers, or ask for less",
        )

    def _settings(self, kept: Mapping[str, int]) -> dict[str, Any]:
        """How the plan with these counts is made, with the warnings of all who have some."""
        notes = self._notes.get(self.key(kept), {})
        warnings = [*self.settings.get("warnings", ()), *notes.get("warnings", ())]
        return {**self.settings, **notes, **({"warnings": warnings} if warnings else {})}

    def _cost_of(self, kind: str, kept: Mapping[str, int]) -> float:
        return float(getattr(self.cost(kept), kind))

    @cached_property
    def _notes(self) -> dict[tuple[int, ...], Mapping[str, Any]]:
        return {}

    @cached_property
    def _unit(self) -> dict[str, Unit]:
        return {unit.name: unit for unit in self.units}

    @cached_property
    def _levels(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Unit name → count of its largest group → counts of all its groups."""
        return {u.name: dict(zip(u.counts, u.levels, strict=True)) for u in self.units}

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {group.name: group.size for group in self.groups}

    @cached_property
    def _worth(self) -> dict[str, list[float]]:
        """How much each best-first prefix of a group's channels is worth, on its own scale."""
        ordered = {name: s.sort(descending=True).values for name, s in self.scores.items()}
        worth = {}
        for name, best in ordered.items():
            gain = best - best.amin().clamp_max(0.0)  # normalised scores may be negative
            worth[name] = [0.0, *(gain.cumsum(0) / gain.mean().clamp_min(1e-30)).tolist()]
        return worth

    def _lead(self, unit: Unit, wanted: Counts) -> float:
        """Channels that the largest group of a unit should keep, by all its groups' wishes."""
        if len(unit.groups) == 1:
            return wanted[unit.name]
        total = sum(self._sizes[name] for name in unit.groups)
        return unit.size * sum(wanted[name] for name in unit.groups) / total

    def _expanded(self, lead: Mapping[str, int]) -> dict[str, int]:
        """Counts of all groups from those of the units' largest."""
        return {
            name: count
            for unit in self.units
            for name, count in zip(
                unit.groups, self._levels[unit.name][lead[unit.name]], strict=True
            )
        }


def units_of(groups: Sequence[Group], allowed: Mapping[str, Sequence[int]]) -> tuple[Unit, ...]:
    """The units of linked groups, in the order of their first group.

    Args:
        groups: with their :attr:`~slimkit.graph.groups.Group.link`.
        allowed: group name → numbers of channels that it may keep, ascending.
    """
    members: dict[str, list[Group]] = {}
    for group in groups:
        members.setdefault(group.link or group.name, []).append(group)
    return tuple(_unit_of(linked, allowed) for linked in members.values())


def _unit_of(linked: Sequence[Group], allowed: Mapping[str, Sequence[int]]) -> Unit:
    lead = max(linked, key=lambda group: group.size)
    choices = [frozenset(allowed[group.name]) for group in linked]
    numbers = [value for group in linked for _, _, value in group.attributes]
    if len(linked) == 1 and not numbers:
        return Unit(lead.name, lead.size, (lead.name,), tuple((n,) for n in allowed[lead.name]))
    levels = []
    for count in allowed[lead.name]:
        if any(count * number % lead.size for number in numbers):
            continue
        level = [divmod(count * group.size, lead.size) for group in linked]
        if all(not rest and n in ok for (n, rest), ok in zip(level, choices, strict=True)):
            levels.append(tuple(n for n, _ in level))
    return Unit(lead.name, lead.size, tuple(group.name for group in linked), tuple(levels))


def _best(scores: Tensor, count: int) -> list[int]:
    """The ``count`` channels with the highest scores, ascending; ties keep the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def checked_evaluation(evaluate: Evaluate) -> Evaluate:
    """``evaluate`` with its mistakes as typed errors.

    Raises:
        PlanError: when called: it raised, or gave no finite number.
    """

    def checked(model: nn.Module) -> float:
        try:
            found = float(evaluate(model))
        except SlimkitError:
            raise
        except Exception as error:
            raise PlanError(
                f"the evaluation failed with {type(error).__name__}: {error}", where="evaluate"
            ) from error
        if not math.isfinite(found):
            raise PlanError(
                f"the evaluation gave {found}",
                where="evaluate",
                hint="return a finite number, higher for a better network",
            )
        return found

    return checked
