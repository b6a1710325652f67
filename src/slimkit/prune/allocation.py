"""Allocations: how many channels each group keeps, and how a target is hit.

An allocation turns scores and a fraction into the number of channels that each group keeps.
:func:`keep_counts` searches the fraction that meets a target on MACs or parameters, rounds,
and gives back what rounding took too much.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from slimkit.registry import Registry

if TYPE_CHECKING:
    from slimkit.graph.groups import Group

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "GlobalRanking",
    "allowed_counts",
    "fit_counts",
    "rounded",
    "uniform",
]


class Allocation(Protocol):
    """(groups, scores by group name, fraction to remove) → channels kept by group name.

    Counts need no rounding and may be fractional; they must not grow with the fraction.
    """

    def __call__(
        self, groups: Sequence[Group], scores: Mapping[str, Tensor], fraction: float, /
    ) -> Mapping[str, float]:
        """Divide ``fraction`` among ``groups``."""


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
"""Name → allocation."""


@ALLOCATIONS.register("uniform")
def uniform(
    groups: Sequence[Group], _scores: Mapping[str, Tensor], fraction: float
) -> dict[str, float]:
    """The same fraction of the channels of every group."""
    return {group.name: group.size * (1.0 - fraction) for group in groups}


@dataclass(frozen=True)
class GlobalRanking:
    """One ranking over the channels of all groups; the lowest-scored fraction goes.

    Scores are divided by the mean of their group, so that layers of different width and
    scale compete on equal terms.

    Attributes:
        max_fraction: at most this part of a group goes, so that no layer dies.
    """

    max_fraction: float = 0.9

    def __call__(
        self, groups: Sequence[Group], scores: Mapping[str, Tensor], fraction: float
    ) -> dict[str, float]:
        """Rank the channels of all ``groups`` and count what survives in each."""
        relative, owners = [], []
        for number, group in enumerate(groups):
            ordered = torch.sort(scores[group.name]).values
            # The best channels of each group stand outside the competition.
            candidates = ordered[: math.floor(self.max_fraction * group.size)]
            relative.append(candidates / ordered.mean().clamp_min(1e-30))
            owners.append(torch.full((len(candidates),), number))
        ranking = torch.cat(owners)[torch.argsort(torch.cat(relative), stable=True)]
        total = sum(group.size for group in groups)
        removed = torch.bincount(ranking[: round(fraction * total)], minlength=len(groups))
        return {g.name: g.size - int(n) for g, n in zip(groups, removed, strict=True)}


ALLOCATIONS.register("global")(GlobalRanking())


def allowed_counts(size: int, multiplicity: int, *, round_to: int, min_channels: int) -> list[int]:
    """The numbers of channels that a group may keep, ascending; the last is ``size``.

    Args:
        size: channels of the group that can go one by one.
        multiplicity: channels of the layers per channel of the group (a grouped convolution
            loses one in every group at once).
        round_to: what stays is a multiple of this many layer channels, or everything.
        min_channels: at least so many layer channels stay.
    """
    step = round_to // math.gcd(round_to, multiplicity)
    counts = [n for n in range(step, size, step) if n * multiplicity >= min_channels]
    return [*counts, size]


def rounded(count: float, allowed: Sequence[int]) -> int:
    """The allowed number nearest to ``count``; of two equally near the larger."""
    position = bisect_left(allowed, count)
    near = allowed[max(position - 1, 0) : position + 1]
    return min(near, key=lambda n: (abs(n - count), -n))


def fit_counts(
    proposal: Callable[[float], Mapping[str, float]],
    allowed: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    value: Callable[[str, int, int], float],
    limit: float,
) -> dict[str, int] | None:
    """The counts that cost at most ``limit`` and as little less as rounding allows.

    Args:
        proposal: fraction → channels kept by group, not growing with the fraction.
        allowed: group → numbers of channels that it may keep, ascending.
        cost: of the network with these counts.
        value: (group, from, to) → worth of keeping ``to`` instead of ``from`` channels.
        limit: what the result may cost.

    Returns:
        Channels kept by group, or None if even the fewest allowed cost more than ``limit``.
    """

    def at(fraction: float) -> dict[str, int]:
        wanted = proposal(min(fraction, 1.0))
        # An allocation may stop at a bound of its own (so that no layer dies). If the target
        # needs more, all groups shrink on from there in proportion.
        scale = min(2.0 - fraction, 1.0)
        return {name: rounded(scale * wanted[name], counts) for name, counts in allowed.items()}

    low, high = 0.0, 2.0
    best = at(high)
    if cost(best) > limit:
        return None
    while high - low > 1e-5:
        middle = (low + high) / 2
        counts = at(middle)
        if cost(counts) <= limit:
            high, best = middle, counts
        else:
            low = middle
    # Rounding makes groups jump together at one fraction: those that need not, go back first.
    below = at(low)
    between = {n: [c for c in counts if c <= below[n]] for n, counts in allowed.items()}
    best = _raised(best, between, cost, value, limit)
    return _raised(best, allowed, cost, value, limit)


def _raised(
    counts: Mapping[str, int],
    allowed: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    value: Callable[[str, int, int], float],
    limit: float,
) -> dict[str, int]:
    """Give channels back, the most valuable per cost first, while the limit holds."""
    result = dict(counts)
    spent = cost(result)
    while True:
        options = []
        for name, choices in allowed.items():
            position = choices.index(result[name]) + 1
            if position < len(choices):
                more = choices[position]
                extra = cost({**result, name: more}) - spent
                if spent + extra <= limit:
                    worth = value(name, result[name], more)
                    options.append((worth / max(extra, 1e-9), name, more))
        if not options:
            return result
        # Several at a time: each is checked again as the earlier ones use up the room.
        for _, name, more in sorted(options, reverse=True):
            after = cost({**result, name: more})
            if after <= limit:
                result[name], spent = more, after
