"""``prune.plan``: which channels leave a network, found without training it.

Top down: capture the network, find the groups of channels that must leave together, score
them by a criterion, let an allocation divide the target among the groups, keep the best
channels of each, and write down every slice and attribute that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.errors import InputError, PlanError
from slimkit.graph.capturing import capture
from slimkit.graph.groups import Group, dependency_groups
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.prune.allocation import ALLOCATIONS, Allocation, allowed_counts, fit_counts, rounded
from slimkit.prune.costing import CostModel
from slimkit.prune.criteria import CRITERIA, Criterion, scored
from slimkit.prune.edits import PrunePlan
from slimkit.prune.writing import write_plan

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["plan"]


@dataclass(frozen=True)
class _Target:
    """What to remove: a fraction of the channels, the MACs or the parameters."""

    kind: str
    fraction: float


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    criterion: str | Criterion = "l2",
    allocation: str | Allocation = "uniform",
    ignore: Pattern | Iterable[Pattern] = (),
    only: Pattern | Iterable[Pattern] = (),
    round_to: int = 8,
    min_channels: int | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
) -> PrunePlan:
    """Decide which channels of ``model`` to remove. The model is not changed.

    Exactly one target, a fraction between 0 and 1 that is *removed*:

    Args:
        model: any module; its last outputs are never pruned.
        example_inputs: a tensor, a tuple, a dict or :class:`slimkit.Inputs`.
        ratio: of the channels of each prunable group (rounded to the nearest allowed
            number); with ``allocation="global"`` of all their channels together.
        macs: of the multiply-accumulate operations of the whole network, at least.
        params: of the parameters of the whole network, at least.
        latency: not available as a target yet.
        criterion: a name (``"l1"``, ``"l2"``, ``"fpgm"``, ``"bn_scale"``, ``"random"``) or a
            callable; see :mod:`slimkit.prune.criteria`.
        allocation: ``"uniform"``, ``"global"`` or a callable; see
            :mod:`slimkit.prune.allocation`.
        ignore: patterns of module paths or class names, or classes, whose *output*
            channels all stay; their inputs follow the layers before them.
        only: if given, only groups made of nothing but matching layers are pruned.
        round_to: a layer keeps a multiple of this many channels, or all of them.
        min_channels: a layer keeps at least so many; ``round_to`` if not given.
        evaluate: used by no allocation that is available yet.

    Returns:
        A plan for :func:`slimkit.apply`; print its ``explain()``.

    Raises:
        InputError, UnknownNameError, PatternError: an argument is wrong.
        CaptureError: the model does not run on the example inputs.
        PlanError: nothing can be pruned, the target is out of reach, or weights are NaN.
    """
    target = _checked_target(ratio=ratio, macs=macs, params=params, latency=latency)
    smallest = _checked_rounding(round_to, min_channels)
    score = CRITERIA.get(criterion, where="criterion") if isinstance(criterion, str) else criterion
    allocate = _allocation(allocation, evaluate)
    inputs = as_inputs(example_inputs)
    ignored = match_modules(model, ignore, where="ignore")
    chosen = match_modules(model, only, where="only") if only else None
    graph = capture(model, inputs)
    groups = dependency_groups(graph, model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    _check_finite(groups, tensors)

    reasons: dict[str, str] = {}
    allowed: dict[str, list[int]] = {}
    scores: dict[str, Tensor] = {}
    for group in groups:
        counts = allowed_counts(
            group.size, _multiplicity(group), round_to=round_to, min_channels=smallest
        )
        reason = _reason_to_stay(group, ignored, chosen) or _reason_of_size(group, counts, round_to)
        if reason is None:
            try:
                scores[group.name] = scored(score, group, tensors)
                allowed[group.name] = counts
            except PlanError as error:
                reason = error.message
        if reason is not None:
            reasons[group.name] = reason
    prunable = [group for group in groups if group.name in allowed]
    if not prunable:
        raise _nothing_to_prune(model, reasons)
    costs = CostModel(graph, model, prunable)
    kept = _kept_counts(target, prunable, scores, allowed, allocate, costs)
    for group in prunable:
        if kept[group.name] == group.size:
            reasons[group.name] = _reason_of_target(target, round_to)
    if all(kept[group.name] == group.size for group in prunable):
        raise PlanError(
            f"{target.kind}={target.fraction:g} removes nothing: every layer is rounded up to "
            f"a multiple of {round_to} channels",
            where=target.kind,
            hint="lower round_to, or ask for more",
        )
    channels = {group.name: _best(scores[group.name], kept[group.name]) for group in prunable}
    return write_plan(
        model,
        graph,
        groups,
        channels,
        reasons,
        costs=(costs.cost(), costs.cost(kept)),
        settings={
            target.kind: target.fraction,
            "criterion": _name_of(criterion),
            "allocation": _name_of(allocation),
            "round_to": round_to,
        },
    )


def _kept_counts(
    target: _Target,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    allowed: Mapping[str, Sequence[int]],
    allocate: Allocation,
    costs: CostModel,
) -> dict[str, int]:
    """Channels that each group keeps so that the target is met."""
    if target.kind == "ratio":
        wanted = allocate(groups, scores, target.fraction)
        return {group.name: rounded(wanted[group.name], allowed[group.name]) for group in groups}

    def cost(kept: Mapping[str, int]) -> float:
        return float(getattr(costs.cost(kept), target.kind))

    # How much each best-first prefix of a group's channels is worth, on the group's own scale.
    worth = {
        name: [0.0, *(best.cumsum(0) / best.abs().mean().clamp_min(1e-30)).tolist()]
        for name, best in ((n, s.sort(descending=True).values) for n, s in scores.items())
    }
    whole = cost({})
    kept = fit_counts(
        lambda fraction: allocate(groups, scores, fraction),
        allowed,
        cost,
        lambda name, fewer, more: worth[name][more] - worth[name][fewer],
        (1.0 - target.fraction) * whole,
    )
    if kept is None:
        raise _out_of_reach(target, groups, allowed, cost, whole)
    return kept


def _best(scores: Tensor, count: int) -> list[int]:
    """The ``count`` channels with the highest scores, ascending; ties keep the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def _multiplicity(group: Group) -> int:
    """Channels of a producing layer per channel of the group (more than 1 if grouped)."""
    return min((slot.width for slot in group.slots if slot.role == "producer"), default=1)


def _reason_to_stay(group: Group, ignored: set[str], chosen: set[str] | None) -> str | None:
    if group.frozen_reason is not None:
        return group.frozen_reason
    for producer in group.producers:
        if producer in ignored:
            return f"{producer} is named by ignore"
    if chosen is not None:
        outside = [producer for producer in group.producers if producer not in chosen]
        if outside and len(outside) < len(group.producers):
            return f"tied to {outside[0]}, which only= does not name"
        if outside or not group.producers:
            return "not named by only="
    return None


def _reason_of_size(group: Group, counts: Sequence[int], round_to: int) -> str | None:
    if len(counts) > 1:
        return None
    size = group.size * _multiplicity(group)
    return f"{size} channels cannot be rounded to fewer (round_to={round_to})"


def _reason_of_target(target: _Target, round_to: int) -> str:
    if target.kind == "ratio":
        return f"rounded up to a multiple of {round_to}"
    return "the target is met without it"


def _checked_target(**targets: float | None) -> _Target:
    latency = targets.pop("latency")
    if latency is not None:
        raise InputError(
            "latency is not available as a target", where="latency", hint="use macs= or params="
        )
    given = [_Target(kind, value) for kind, value in targets.items() if value is not None]
    if len(given) != 1:
        names = " and ".join(f"{target.kind}=" for target in given) or "none"
        raise InputError(
            f"give exactly one target, got {names}",
            where="prune.plan",
            hint="ratio=, macs= or params=: the fraction to remove",
        )
    (target,) = given
    if not _is_number(target.fraction) or not 0.0 < target.fraction < 1.0:
        raise InputError(
            f"expected a fraction to remove between 0 and 1, got {target.fraction!r}",
            where=target.kind,
            hint="0.5 removes half",
        )
    return target


def _checked_rounding(round_to: int, min_channels: int | None) -> int:
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if value is not None and (not _is_number(value) or value < 1 or value != int(value)):
            raise InputError(f"expected a whole number ≥ 1, got {value!r}", where=name)
    return round_to if min_channels is None else min_channels


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _allocation(
    allocation: str | Allocation, evaluate: Callable[[nn.Module], float] | None
) -> Allocation:
    chosen = allocation
    if isinstance(chosen, str):
        chosen = ALLOCATIONS.get(chosen, where="allocation")
    if evaluate is not None:
        raise InputError(
            f"the allocation {_name_of(allocation)!r} does not use an evaluation",
            where="evaluate",
            hint="leave it out; none of " + ", ".join(ALLOCATIONS.names()) + " needs it",
        )
    return chosen


def _check_finite(groups: Sequence[Group], tensors: Mapping[str, Tensor]) -> None:
    for name in dict.fromkeys(slot.tensor for group in groups for slot in group.slots):
        tensor = tensors[name]
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach().sum())):
            continue  # the sum is NaN or infinite if any element is, and needs no copy
        if not bool(torch.isfinite(tensor).all()):
            raise PlanError(
                "the weights hold NaN or infinite values",
                where=name,
                hint="load a checkpoint whose training did not diverge",
            )


def _nothing_to_prune(model: nn.Module, reasons: Mapping[str, str]) -> PlanError:
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return PlanError(
        f"no channels of {type(model).__name__} can be pruned: "
        + (listed + more or "no convolution or linear layer was found"),
        where="prune.plan",
    )


def _out_of_reach(
    target: _Target,
    groups: Sequence[Group],
    allowed: Mapping[str, Sequence[int]],
    cost: Callable[[Mapping[str, int]], float],
    whole: float,
) -> PlanError:
    least = {group.name: allowed[group.name][0] for group in groups}
    left = cost(least)
    # What the network would still lose if a group could go entirely: the limiting groups.
    gains = {name: left - cost({**least, name: 0}) for name in least}
    worst = sorted(gains, key=lambda name: -gains[name])[:3]
    limits = ", ".join(f"{name} (keeps {least[name]})" for name in worst)
    return PlanError(
        f"{target.kind}={target.fraction:g} is out of reach: at most "
        f"{1 - left / whole:.3f} can go, limited by {limits} and by what cannot be pruned",
        where=target.kind,
        hint="lower round_to or min_channels, ignore fewer layers, or ask for less",
    )


def _name_of(choice: Any) -> str:
    if isinstance(choice, str):
        return choice
    return str(getattr(choice, "__name__", choice))
