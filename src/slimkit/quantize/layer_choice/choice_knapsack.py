"""One choice per item within a budget, at the least loss: the multiple-choice knapsack problem.

Solved by dynamic programming over the Pareto front of (cost, loss), item by item (Kellerer,
Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). It is exact as long as the front
stays below a limit, which fronts of real networks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Whole = npt.NDArray[np.int64]
    Real = npt.NDArray[np.float64]

__all__ = ["choose_within"]

FRONT = 50_000


def choose_within(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    front: int = FRONT,
) -> list[int] | None:
    """The choice of each item that makes the sum of losses smallest.

    Args:
        costs: per item, per choice; whole numbers ≥ 0 whose sum stays below 2^63.
        losses: likewise, finite.
        budget: the sum of costs may be equal to it.
        front: so many partial solutions are kept at most. Should there be more, the loss is
            still no larger than the least one for a budget that is smaller by about
            (number of items) / ``front`` of it.

    Returns:
        Index of the choice per item; of equally good solutions the cheapest. None if even the
        cheapest choices cost more than the budget.
    """
    least_rest = np.cumsum([0, *(min(item) for item in reversed(costs))])[::-1]
    if least_rest[0] > budget:
        return None
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Whole, Whole]] = []
    for number, (of_cost, of_loss) in enumerate(zip(costs, losses, strict=True)):
        width = len(of_cost)
        sums = (cost[:, None] + np.asarray(of_cost, np.int64)).reshape(-1)
        total = (loss[:, None] + np.asarray(of_loss, np.float64)).reshape(-1)
        kept = _front(sums, total, int(budget - least_rest[number + 1]), front)
        cost, loss = sums[kept], total[kept]
        steps.append((kept // width, kept % width))
    place = int(np.argmin(loss))
    choices = []
    for parent, choice in reversed(steps):
        choices.append(int(choice[place]))
        place = int(parent[place])
    return choices[::-1]


def _front(cost: Whole, loss: Real, most: int, limit: int) -> Whole:
    """Indices of partial solutions that no other one beats in both, cheapest first."""
    order = np.lexsort((loss, cost))
    order = order[cost[order] <= most]
    best = np.minimum.accumulate(loss[order])
    better = np.ones(len(order), bool)
    better[1:] = loss[order][1:] < best[:-1]
    front = order[better]
    if len(front) <= limit:
        return front
    # Losses fall along the front: of neighbours in one cell of costs the last is the best.
    cell = cost[front] // max(1, -(-(most + 1) // (limit - 1)))
    last = np.ones(len(front), bool)
    last[:-1] = cell[1:] != cell[:-1]
    last[0] = True  # the cheapest one keeps the rest within reach
    return front[last]
