"""The multiple-choice knapsack problem: one choice per item within a budget, at the least loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimkit.errors import PlanError

__all__ = ["choose_within"]

_LOSS_SCALE = 1e6
"""What the largest loss is scaled to: HiGHS stops at an absolute gap of 1e-6, which then is a
relative one of 1e-12."""
_ATTEMPTS = 8
"""Times that the budget is lowered by what a solution exceeded it by."""


def choose_within(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int] | None:
    """The choice of each item that makes the sum of losses smallest.

    A mixed-integer linear program with one binary variable per item and choice, solved by
    branch and bound (HiGHS, by :func:`scipy.optimize.milp`).

    Args:
        costs: per item, per choice; whole numbers ≥ 0 whose sum stays below 2^63.
        losses: likewise, finite.
        budget: the sum of costs may be equal to it.

    Returns:
        Index of the choice per item. None if even the cheapest choices cost more than the budget.

    Raises:
        PlanError: the solver gave up, which it has no reason to.
    """
    if sum(min(item) for item in costs) > budget:
        return None
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    widths = [len(item) for item in costs]
    cost = np.concatenate([np.asarray(item, np.float64) for item in costs])
    loss = np.concatenate([np.asarray(item, np.float64) for item in losses])
    unit = max(1.0, float(cost.max()))
    owner = np.repeat(np.arange(len(widths)), widths)
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    allowed = float(budget)
    for _ in range(_ATTEMPTS):
        found = milp(
            loss / (float(loss.max()) or 1.0) * _LOSS_SCALE,
            integrality=np.ones_like(loss),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None] / unit, -np.inf, allowed / unit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        ends = np.cumsum(widths)[:-1]
        chosen = [int(part.argmax()) for part in np.split(found.x, ends)]
        spent = sum(item[pick] for item, pick in zip(costs, chosen, strict=True))
        if spent <= budget:
            return chosen
        allowed -= 2 * (spent - budget)  # within the tolerance of the solver, not of the budget
    raise PlanError("the solver found no choice within the budget", where="budget")
