"""Counts of channels that meet a cost limit: bisection along a family, then greedy filling."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

__all__ = ["allowed_counts", "fit_counts", "rounded"]


_STEP = 1e-5
"""Width at which bisection ends, in fractions: less than one channel of 50,000."""


def allowed_counts(
    size: int, widths: Sequence[int], *, round_to: int, min_channels: int
) -> list[int]:
    """The numbers of channels that a group may keep, ascending; the last is ``size``.

    Args:
        size: channels of the group that can go one by one.
        widths: channels of each layer per channel of the group (a grouped convolution
            loses one in every group at once).
        round_to: what stays is a multiple of this many channels in each layer, or everything.
        min_channels: at least so many channels stay in each layer.
    """
    step = math.lcm(*(round_to // math.gcd(round_to, width) for width in widths))
    counts = [n for n in range(step, size, step) if n * min(widths) >= min_channels]
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

    Bisection on the fraction finds the first member of the family that costs at most ``limit``.
    What rounding took too much is given back by a greedy knapsack: most worth per cost first.

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
    while high - low > _STEP:
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
    """Greedy knapsack: give channels back, most worth per cost first, while the limit holds."""
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
