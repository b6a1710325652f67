"""Iterative pruning: prune a little, train a little, until the target is met."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from slimkit.doors import door
from slimkit.errors import InputError, TrainingError, UnknownNameError, nearest
from slimkit.inputs import ExampleInputs
from slimkit.outside import signalled
from slimkit.plan import apply
from slimkit.prune.edits import PrunePlan
from slimkit.prune.planning import plan, space
from slimkit.prune.targets import checked_target, is_number

if TYPE_CHECKING:
    from slimkit.graph.groups import Group

__all__ = ["SCHEDULES", "Schedule", "iterate"]

Schedule = Callable[[float], float]
"""Part of the steps that is over, 0 … 1 → part of the target that is reached, 0 … 1."""

SCHEDULES: Mapping[str, Schedule] = {
    "linear": lambda part: part,
    "cubic": lambda part: 1.0 - (1.0 - part) ** 3,
}
"""``"cubic"`` removes most in the first steps, when there is most to spare (Zhu & Gupta 2017,
"To prune, or not to prune", eq. 1)."""


@door
def iterate(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    train: Callable[[nn.Module, int], object],
    steps: int = 5,
    schedule: str | Schedule = "cubic",
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    reallocate: bool = False,
    optimizer: Any = None,
    companions: Sequence[Any] = (),
    **options: Any,
) -> list[PrunePlan]:
    """Prune ``model`` in place, in several steps with training after each.

    Exactly one target, a fraction that is removed of the *original* network, as for
    :func:`slimkit.prune.plan`. How many channels each group keeps in the end is decided
    before the first step; each step goes a part of the way there and chooses channels anew,
    by what training made of the weights. A target that is out of reach is known before
    anything is trained.

    Args:
        model: changed; :func:`slimkit.save` then writes its weights and all plans.
        example_inputs: as for :func:`slimkit.prune.plan`.
        train: ``train(model, step)``, called after each of the ``steps`` (from 0).
        steps: 1 or more. One in which rounding leaves nothing to remove only trains.
        schedule: ``"linear"``, ``"cubic"``, or a function; see :data:`Schedule`.
        ratio: of the channels of each group.
        macs: of the multiply-accumulates.
        params: of the parameters.
        latency: of the measured milliseconds.
        reallocate: divide what is left among the groups anew in each step, by the scores of
            that step; for ``macs`` and ``params``.
        optimizer: the one that ``train`` uses: its state is sliced along with the weights.
        companions: what else goes on with the network, as for :func:`slimkit.apply`.
        options: of :func:`slimkit.prune.plan`: criterion, allocation, ignore, round_to …

    Returns:
        The plans in order, as many as steps that removed something.

    Raises:
        InputError, UnknownNameError, PatternError, CaptureError, PlanError: as for
            :func:`slimkit.prune.plan`; a wrong schedule or number of steps.
    """
    target = checked_target(ratio=ratio, macs=macs, params=params, latency=latency)
    shares = _shares(schedule, steps)
    if reallocate and target.kind not in ("macs", "params"):
        raise InputError(
            f"a target of {target.kind} is divided among the groups once",
            where="reallocate",
            hint="use macs= or params=",
        )
    whole = plan(model, example_inputs, **{**options, target.kind: target.fraction})
    groups = space(model, example_inputs, **{**_of_space(options), "criterion": "l1"}).groups
    end = _counts(whole, groups)
    cost = float(getattr(whole.before, target.kind)) if reallocate else 0.0
    left = cost
    done: list[PrunePlan] = []
    for step, share in enumerate(shares):
        settings = {**whole.settings, "step": f"{step + 1} of {steps}"}
        found: PrunePlan | None
        if reallocate:
            limit = cost * (1.0 - share * target.fraction)
            found = None
            if limit < left:
                now = {**options, target.kind: 1.0 - limit / left}
                found = plan(model, example_inputs, **now)
                left = float(getattr(found.after, target.kind))
                found = replace(found, settings=settings)
        else:
            found = _toward(model, example_inputs, end, share, settings, options)
        if found is not None:
            apply(model, found, optimizer=optimizer, companions=companions)
            done.append(found)
        signalled(train, TrainingError, "train", model, step)
    return done


def _shares(schedule: str | Schedule, steps: int) -> list[float]:
    """The part of the target that is reached after each step."""
    if not is_number(steps) or steps < 1 or steps != int(steps):
        raise InputError(f"expected a whole number ≥ 1, got {steps!r}", where="steps")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise UnknownNameError(
                f"unknown schedule {schedule!r}",
                where="schedule",
                hint=nearest(schedule, SCHEDULES),
            )
        schedule = SCHEDULES[schedule]
    shares = [float(schedule((step + 1) / steps)) for step in range(int(steps))]
    rising = all(a <= b for a, b in zip([0.0, *shares], shares, strict=False))
    if not rising or abs(shares[-1] - 1.0) > 1e-6:
        shown = ", ".join(f"{share:.3g}" for share in shares)
        raise InputError(
            f"a schedule must rise from 0 to 1, and this one gives {shown}", where="schedule"
        )
    return [*shares[:-1], 1.0]


def _toward(
    model: nn.Module,
    example_inputs: ExampleInputs,
    end: Mapping[str, tuple[int, int]],
    share: float,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> PrunePlan | None:
    """The plan that goes ``share`` of the way to the final counts; None if that is nothing."""
    choices = space(model, example_inputs, **_of_space(options))
    wanted = {}
    for group in choices.groups:
        size, kept = end.get(group.name, (group.size, group.size))
        wanted[group.name] = min(float(group.size), size - share * (size - kept))
    counts = choices.legal(wanted)
    if all(counts[group.name] == group.size for group in choices.groups):
        return None
    return replace(choices, settings=settings).plan(counts)


def _counts(final: PrunePlan, groups: Sequence[Group]) -> dict[str, tuple[int, int]]:
    """Group name → (channels before, channels after ``final``)."""
    keeps = {(edit.tensor, edit.dim): edit.keep for edit in final.edits}
    counts = {}
    for group in groups:
        slot = group.slots[0]
        keep = keeps.get((slot.tensor, slot.dim))
        stays = group.size
        if keep is not None:
            stays = int(np.isin(slot.positions, keep).all(axis=1).sum())
        counts[group.name] = group.size, stays
    return counts


def _of_space(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of ``plan`` that say what can be pruned, and by which scores."""
    known = inspect.signature(space).parameters
    return {name: value for name, value in options.items() if name in known}
