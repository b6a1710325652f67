"""Allocations: how a target is divided among the groups.

An allocation looks at a :class:`~slimkit.prune.prune_space.PruneSpace` and answers with a
*proposal*: a function from a fraction (0 … 1) to the number of channels that each group keeps.
:meth:`PruneSpace.fit <slimkit.prune.prune_space.PruneSpace.fit>` finds the fraction that meets the
target, rounds, and gives back what rounding took too much, so every allocation takes every
target. Register one by name::

    @ALLOCATIONS.register("deeper_more")
    def deeper_more(space, _target):
        depth = {g.name: (i + 1) / len(space.groups) for i, g in enumerate(space.groups)}
        return lambda f: {g.name: g.size * (1 - f * depth[g.name]) for g in space.groups}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.errors import InputError, PatternError, nearest
from slimkit.graph.patterns import match_modules
from slimkit.registry import Registry

if TYPE_CHECKING:
    from slimkit.graph.groups import Group
    from slimkit.prune.prune_space import Proposal, PruneSpace
    from slimkit.prune.targets import RemovalTarget

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "GivenRatios",
    "GlobalRanking",
    "IsomorphicRanking",
    "uniform",
]


class Allocation(Protocol):
    """(space, target) → proposal."""

    def __call__(self, space: PruneSpace, target: RemovalTarget, /) -> Proposal:
        """How to divide any fraction among the groups of ``space``."""


ALLOCATIONS: Registry[Allocation] = Registry("allocation", fits=callable)
"""Name → allocation."""


@ALLOCATIONS.register("uniform")
def uniform(space: PruneSpace, _target: RemovalTarget) -> Proposal:
    """The same fraction of the channels of every group."""
    return lambda fraction: {g.name: g.size * (1.0 - fraction) for g in space.groups}


@door
@dataclass(frozen=True)
class GlobalRanking:
    """One ranking over the channels of all groups; the lowest-scored fraction goes.

    Attributes:
        max_fraction: at most this part of a group goes, so that no layer dies; where the target
            needs more, all groups shrink on from there in proportion.
        relative: divide scores by their mean magnitude in the group, so that layers of
            different width and scale compete on equal terms. False takes them as they are,
            which fits criteria that estimate what the loss suffers (Taylor, group Fisher, OBD).
    """

    max_fraction: float = 0.9
    relative: bool = True

    def __call__(self, space: PruneSpace, _target: RemovalTarget) -> Proposal:
        """Rank the channels of all groups."""
        return _ranked([space.groups], space.scores, self.max_fraction, self.relative)


@door
@dataclass(frozen=True)
class IsomorphicRanking:
    """One ranking per kind of structure (Fang et al. 2024, "Isomorphic Pruning").

    Groups with the same layers around their channels (types, kernel sizes, roles) compete
    among each other by their scores as they are; each kind loses the same fraction. Scores of
    attention heads and of convolution filters are never compared.

    Attributes:
        max_fraction: at most this part of a group goes.
    """

    max_fraction: float = 0.9

    def __call__(self, space: PruneSpace, _target: RemovalTarget) -> Proposal:
        """Rank the channels of each kind of group."""
        modules = dict(space.model.named_modules())
        kinds: dict[object, list[Group]] = {}
        for group in space.groups:
            kinds.setdefault(_structure(group, modules), []).append(group)
        return _ranked(list(kinds.values()), space.scores, self.max_fraction, False)


def _structure(group: Group, modules: Mapping[str, object]) -> tuple[object, ...]:
    """What makes two groups alike: their slots by role, type of layer, dimension and width."""
    return tuple(
        sorted(
            (
                slot.role,
                type(modules.get(slot.module)).__name__,
                str(getattr(modules.get(slot.module), "kernel_size", "")),
                slot.tensor.rpartition(".")[2],
                slot.dim,
                slot.width,
            )
            for slot in group.slots
        )
    )


_LEAST = 1e-30
"""Divisor at least, for groups whose scores are all 0: far below any float32 score."""


def _ranked(
    competitions: Sequence[Sequence[Group]],
    scores: Mapping[str, Tensor],
    max_fraction: float,
    relative: bool,
) -> Callable[[float], dict[str, float]]:
    """The lowest-scored fraction of each competition goes.

    Beyond ``max_fraction`` all groups shrink on in proportion, as for a target that needs it.
    """
    rankings = []
    for groups in competitions:
        candidates, owners = [], []
        for number, group in enumerate(groups):
            ordered = torch.sort(scores[group.name]).values
            # The best channels of each group stand outside the competition.
            rivals = ordered[: math.floor(max_fraction * group.size)]
            # The mean magnitude: a mean near 0, as normalised scores have it, is rounding noise.
            scale = ordered.abs().mean().clamp_min(_LEAST) if relative else 1.0
            candidates.append(rivals / scale)
            owners.append(torch.full((len(rivals),), number))
        order = torch.argsort(torch.cat(candidates), stable=True)
        rankings.append((groups, torch.cat(owners)[order]))

    def proposal(fraction: float) -> dict[str, float]:
        kept: dict[str, float] = {}
        for groups, ranking in rankings:
            total = sum(group.size for group in groups)
            removed = torch.bincount(ranking[: round(fraction * total)], minlength=len(groups))
            beyond = min(1.0, (1.0 - fraction) * total / max(total - len(ranking), 1))
            kept.update(
                {g.name: beyond * (g.size - int(n)) for g, n in zip(groups, removed, strict=True)}
            )
        return kept

    return proposal


ALLOCATIONS.register("global")(GlobalRanking())
ALLOCATIONS.register("isomorphic")(IsomorphicRanking())


@door
@dataclass(frozen=True)
class GivenRatios:
    """Ratios of your own: pattern of module names → fraction that these layers lose.

    With ``ratio=`` as the target they are taken as they are (``ratio`` is for all other
    layers); with another target all are scaled alike until it is met.

    Attributes:
        ratios: shell pattern of module paths or class names → fraction to remove, 0 … 1.
        default: fraction for layers that no pattern names; the target's where it is a ratio.
    """

    ratios: Mapping[str, float]
    default: float | None = None

    def __call__(self, space: PruneSpace, target: RemovalTarget) -> Proposal:
        """Check the patterns and scale the given ratios."""
        given = self._by_group(space)
        rest = self.default if self.default is not None else target.fraction
        ratios = {g.name: given.get(g.name, rest) for g in space.groups}
        if target.kind == "ratio":
            return lambda _fraction: {g.name: g.size * (1 - ratios[g.name]) for g in space.groups}
        largest = max(ratios.values(), default=0.0) or 1.0
        return lambda fraction: {
            g.name: g.size * (1 - min(1.0, fraction * ratios[g.name] / largest))
            for g in space.groups
        }

    def _by_group(self, space: PruneSpace) -> dict[str, float]:
        found: dict[str, float] = {}
        for pattern, ratio in self.ratios.items():
            if not 0 <= ratio <= 1:
                raise InputError(
                    f"expected a fraction between 0 and 1, got {ratio}", where=f"ratios.{pattern}"
                )
            layers = match_modules(space.model, pattern, where="ratios")
            named = [g.name for g in space.groups if layers & set(g.producers)]
            if not named:
                raise PatternError(
                    f"the pattern {pattern!r} matches no layer that can be pruned",
                    where="ratios",
                    hint=nearest(pattern, [p for g in space.groups for p in g.producers]),
                )
            for name in named:
                if found.setdefault(name, ratio) != ratio:
                    raise InputError(
                        f"the patterns give {name} two ratios, {found[name]} and {ratio}",
                        where="ratios",
                        hint="its layers share their channels and can only lose the same ones",
                    )
        return found
