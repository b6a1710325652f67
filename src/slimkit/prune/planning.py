"""``prune.plan``: which channels leave a network, found without training it.

Top down: capture the network, find the groups of channels that must leave together, score
them by a criterion, let an allocation divide the target among the groups, keep the best
channels of each, and write down every slice and attribute that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError, PlanError, nearest
from slimkit.graph.capturing import BothModes, Graph, capture_both_modes
from slimkit.graph.computed_weights import masked_weights
from slimkit.graph.grouping import dependency_groups
from slimkit.graph.groups import ATTENTION, AttentionPart, Group
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.graph.unseen import Unseen, protected_values, unseen_parts, without_unused
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.modules import Evaluate
from slimkit.outside import called
from slimkit.prune.allocation.ranking import ALLOCATIONS, Allocation, GivenRatios
from slimkit.prune.criteria.scores import CRITERIA, Criterion, prepared, scored
from slimkit.prune.edits import PrunePlan
from slimkit.prune.fitting import allowed_counts
from slimkit.prune.prune_space import PruneSpace, checked_evaluation, units_of
from slimkit.prune.targets import checked_target, is_number

__all__ = ["plan", "space"]


@door
def plan(  # noqa: PLR0913 - the verb: every choice is a keyword with a default
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    criterion: str | Criterion = "l2",
    allocation: str | Allocation | Mapping[str, float] = "uniform",
    ignore: Pattern | Iterable[Pattern] = (),
    only: Pattern | Iterable[Pattern] = (),
    unused: Pattern | Iterable[Pattern] = (),
    equal: Iterable[Iterable[Pattern]] = (),
    limits: Mapping[str, tuple[int | None, int | None]] | None = None,
    attention: AttentionPart | None = None,
    round_to: int = 8,
    min_channels: int | None = None,
    evaluate: Evaluate | None = None,
    backend: str = "onnxruntime",
    threads: int = 1,
    deployed: Callable[[nn.Module], nn.Module] | None = None,
    progress: bool = True,
) -> PrunePlan:
    """Decide which channels of ``model`` to remove. The model is not changed.

    The model is run once in evaluation and once in training mode: auxiliary heads that run in
    training only are pruned along, and what ran in neither is named in the plan's warnings.

    Exactly one target, a fraction between 0 and 1 that is *removed*:

    Args:
        model: any module; its last outputs are never pruned.
        example_inputs: a tensor, a tuple, a dict or :class:`slimkit.Inputs`.
        ratio: of the channels of each prunable group (rounded to the nearest allowed
            number); with a ranking allocation of all their channels together.
        macs: of the multiply-accumulate operations of the whole network, at least.
        params: of the parameters of the whole network, at least.
        latency: of the milliseconds that the network takes in ``backend``, measured on pruned
            copies until it is met; see :mod:`slimkit.prune.latency_target`.
        criterion: a name (``"l1"``, ``"l2"``, ``"fpgm"``, ``"bn_scale"``, ``"random"``) or a
            callable; see :mod:`slimkit.prune.criteria.scores`.
        allocation: a name, a callable (see :mod:`slimkit.prune.allocation.ranking`), or a mapping
            from patterns of layers to the fraction that each loses.
        ignore: patterns of module paths or class names, or classes, whose *output*
            channels all stay; their inputs follow the layers before them.
        only: if given, only groups made of nothing but matching layers are pruned.
        unused: patterns of modules and parameters that run neither in evaluation nor in
            training, and never will: without this, everything that they could read stays whole
            (the plan's warnings name them).
        equal: lists of patterns; the layers of one list keep equal fractions.
        limits: pattern → (fewest, most) output channels that a layer keeps; None for no limit.
        attention: ``"heads"`` removes whole heads of attention layers, ``"channels"`` some
            channels of every head; None takes what the model's code allows best.
        round_to: a layer keeps a multiple of this many channels, or all of them.
        min_channels: a layer keeps at least so many; ``round_to`` if not given.
        evaluate: network → how good it is, higher is better; for allocations that try
            pruned copies (``"sensitivity"``, ``"annealing"``, ``"genetic"``). Give it
            training or validation data, never test data.
        backend: where latency is measured.
        threads: that it may use.
        deployed: network → what will run in its place, such as a quantized copy: latency is
            measured on that, of the unpruned network too. None for the network itself.
        progress: show on standard error how measuring and trying goes on.

    Returns:
        A plan for :func:`slimkit.apply`; print its ``explain()``.

    Raises:
        InputError, UnknownNameError, PatternError: an argument is wrong.
        CaptureError: the model does not run on the example inputs.
        PlanError: nothing can be pruned, the target is out of reach, weights are NaN, or the
            evaluation failed.
    """
    target = checked_target(ratio=ratio, macs=macs, params=params, latency=latency)
    allocate = _allocation(allocation)
    choices = space(
        model,
        example_inputs,
        criterion=criterion,
        ignore=ignore,
        only=only,
        unused=unused,
        equal=equal,
        limits=limits,
        attention=attention,
        round_to=round_to,
        min_channels=min_channels,
        evaluate=evaluate,
    )
    choices = replace(
        choices,
        settings={
            target.kind: target.fraction,
            **choices.settings,
            "allocation": _name(allocation),
        },
        measuring={"backend": backend, "threads": threads, "deployed": deployed},
        progress=progress,
    )
    kept = choices.fit(called(allocate, InputError, "allocation", choices, target), target)
    if all(kept[group.name] == group.size for group in choices.groups):
        raise PlanError(
            f"{target} removes nothing: every layer is rounded up to a multiple of "
            f"{round_to} channels",
            where=target.kind,
            hint="lower round_to, or ask for more",
        )
    return choices.plan(kept)


@door
def space(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    criterion: str | Criterion = "l2",
    ignore: Pattern | Iterable[Pattern] = (),
    only: Pattern | Iterable[Pattern] = (),
    unused: Pattern | Iterable[Pattern] = (),
    equal: Iterable[Iterable[Pattern]] = (),
    limits: Mapping[str, tuple[int | None, int | None]] | None = None,
    attention: AttentionPart | None = None,
    round_to: int = 8,
    min_channels: int | None = None,
    evaluate: Evaluate | None = None,
) -> PruneSpace:
    """What of ``model`` can be pruned, scored: the first half of :func:`plan`.

    For those who choose the numbers of channels themselves: ``space.plan(counts)`` gives the
    plan in which every group keeps its best channels. Arguments and errors are those of
    :func:`plan`.
    """
    smallest = _checked_rounding(round_to, min_channels)
    score = CRITERIA.get(criterion, where="criterion") if isinstance(criterion, str) else criterion
    if attention not in (None, *ATTENTION):
        hint = nearest(str(attention), ATTENTION)
        raise InputError(f"unknown choice {attention!r}", where="attention", hint=hint)
    inputs = as_inputs(example_inputs)
    ignored = match_modules(model, ignore, where="ignore")
    chosen = match_modules(model, only, where="only") if only else None
    bounds = _bounds(model, limits or {})
    captured = capture_both_modes(model, inputs)
    unseen = without_unused(unseen_parts(model, captured), model, unused)
    protected = protected_values(unseen, captured)
    found = dependency_groups(captured.both, model, attention, protected)
    groups = _equalised(found, model, equal)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    _check_finite(groups, tensors)

    reasons: dict[str, str] = {}
    allowed: dict[str, list[int]] = {}
    for group in groups:
        counts = allowed_counts(
            group.size, _widths(group, round_to), round_to=round_to, min_channels=smallest
        )
        counts = _within(group, counts, bounds)
        reason = _reason_to_stay(group, ignored, chosen) or _reason_of_size(group, counts, round_to)
        if reason is None:
            allowed[group.name] = counts
        else:
            reasons[group.name] = reason
    prunable = _linked_alike(groups, allowed, reasons, round_to)
    if prunable:
        score = prepared(score, model, prunable)
    effective = {**tensors, **_masked(tensors, captured.both)}
    scores: dict[str, Tensor] = {}
    for group in prunable:
        try:
            scores[group.name] = scored(score, group, effective)
        except PlanError as error:
            del allowed[group.name]
            reasons[group.name] = error.message
    prunable = _linked_alike(groups, allowed, reasons, round_to)
    if not prunable:
        raise _nothing_to_prune(model, reasons, unseen)
    return PruneSpace(
        model,
        inputs,
        captured.evaluation,
        captured.both,
        groups,
        prunable,
        {group.name: scores[group.name] for group in prunable},
        allowed,
        reasons,
        settings={
            "criterion": _name(criterion),
            "round_to": round_to,
            **({"attention": attention} if attention else {}),
            **_warnings(unseen, captured),
        },
        evaluate=None if evaluate is None else checked_evaluation(evaluate),
    )


def _masked(tensors: Mapping[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Weights that are multiplied by a mask, as the network sees them."""
    masks = masked_weights(graph)
    return {name: tensors[name].detach() * tensors[mask] for name, mask in masks.items()}


def _warnings(unseen: Sequence[Unseen], captured: BothModes) -> dict[str, list[str]]:
    """The plan's setting ``warnings``, where there is something to say."""
    if not unseen:
        return {}
    named = ", ".join(str(part) for part in unseen[:8])
    more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
    text = (
        f"did not run on the example inputs: {named}{more}; what they could read stays whole "
        "(name them in unused= if they stay out of use)"
    )
    if captured.failure:
        text += f"; training mode was not seen whole: {captured.failure}"
    return {"warnings": [text]}


def _equalised(
    groups: list[Group], model: nn.Module, equal: Iterable[Iterable[Pattern]]
) -> list[Group]:
    """Link the groups that the user wants to keep equal fractions."""
    for number, patterns in enumerate(equal):
        layers = match_modules(model, list(patterns), where=f"equal[{number}]")
        lead: str | None = None
        for index, group in enumerate(groups):
            if group.frozen_reason is None and layers & set(group.producers):
                lead = lead or group.link or group.name
                old = group.link or group.name
                groups = [replace(g, link=lead) if (g.link or g.name) == old else g for g in groups]
                groups[index] = replace(group, link=lead)
    return groups


def _linked_alike(
    groups: Sequence[Group],
    allowed: dict[str, list[int]],
    reasons: dict[str, str],
    round_to: int,
) -> list[Group]:
    """The prunable groups; where one of a linked set must stay, all of it stays."""
    by_link: dict[str, list[Group]] = {}
    for group in groups:
        by_link.setdefault(group.link or group.name, []).append(group)
    for linked in by_link.values():
        whole = next((group for group in linked if group.name not in allowed), None)
        if whole is None and not _can_shrink(linked, allowed):
            shown = ", ".join(f"{group.name} ({group.size})" for group in linked[:3])
            why = f"no smaller size suits all of {shown} (round_to={round_to})"
        elif whole is not None:
            why = f"its size follows that of {whole.name}, which stays: {reasons[whole.name]}"
        else:
            continue
        for group in linked:
            if allowed.pop(group.name, None) is not None:
                reasons[group.name] = why
    return [group for group in groups if group.name in allowed]


def _can_shrink(linked: Sequence[Group], allowed: Mapping[str, Sequence[int]]) -> bool:
    (unit,) = units_of(linked, allowed)
    return bool(unit.levels) and unit.counts[0] < unit.size


def _widths(group: Group, round_to: int) -> list[int]:
    """Channels that each producing layer loses with one channel of the group.

    More than 1 in grouped layers and attention heads. Layers that have fewer channels than
    ``round_to`` (one that mixes heads, say) do not count beside larger ones.
    """
    widths = {slot.width for slot in group.slots if slot.role == "producer"} or {1}
    return sorted({w for w in widths if w * group.size >= round_to} or {max(widths)})


def _bounds(
    model: nn.Module, limits: Mapping[str, tuple[int | None, int | None]]
) -> list[tuple[set[str], int, float]]:
    """(layers, fewest, most) of every limit."""
    found = []
    for pattern, (fewest, most) in limits.items():
        if fewest is not None and most is not None and fewest > most:
            raise InputError(
                f"the fewest channels, {fewest}, are more than the most, {most}",
                where=f"limits.{pattern}",
            )
        layers = match_modules(model, pattern, where="limits")
        found.append((layers, fewest or 0, float("inf") if most is None else most))
    return found


def _within(
    group: Group, counts: list[int], bounds: Sequence[tuple[set[str], int, float]]
) -> list[int]:
    """The counts that every limit on a layer of the group allows."""
    width = _widths(group, 1)[0]
    for layers, fewest, most in bounds:
        if not layers & set(group.producers):
            continue
        found = [n for n in counts if min(fewest, group.size * width) <= n * width <= most]
        if not found:
            raise InputError(
                f"{group.name} can keep {', '.join(str(n * width) for n in counts[:6])} … of "
                f"{group.size * width} channels, none between {fewest} and {most:g}",
                where="limits",
                hint="lower round_to, or widen the limit",
            )
        counts = found
    return counts


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
    if counts[0] < group.size:
        return None
    size = group.size * _widths(group, round_to)[0]
    return f"{size} channels cannot be rounded to fewer (round_to={round_to})"


def _checked_rounding(round_to: int, min_channels: int | None) -> int:
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if value is not None and (not is_number(value) or value < 1 or value != int(value)):
            raise InputError(f"expected a whole number ≥ 1, got {value!r}", where=name)
    return round_to if min_channels is None else min_channels


def _allocation(allocation: str | Allocation | Mapping[str, float]) -> Allocation:
    if isinstance(allocation, str):
        return ALLOCATIONS.get(allocation, where="allocation")
    return GivenRatios(allocation) if isinstance(allocation, Mapping) else allocation


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


def _nothing_to_prune(
    model: nn.Module, reasons: Mapping[str, str], unseen: Sequence[Unseen]
) -> PlanError:
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:4])
    more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return PlanError(
        f"no channels of {type(model).__name__} can be pruned: "
        + (listed + more or "no convolution or linear layer was found"),
        where="prune.plan",
        hint="name in unused= what never runs" if unseen else None,
    )


def _name(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    return dict(choice) if isinstance(choice, Mapping) else str(getattr(choice, "__name__", choice))
