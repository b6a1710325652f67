"""Group Fisher pruning as a process: the least important channel leaves, then the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.inputs import Batch, ExampleInputs
from slimkit.modules import restored_flags
from slimkit.prune.batches import Batches, Loss, each_batch, evaluated_copy
from slimkit.prune.criteria.fisher import ChannelMasks, Saving
from slimkit.prune.criteria.scores import Random, check_choice
from slimkit.prune.planning import space
from slimkit.prune.targets import RemovalTarget, checked_target, is_number

if TYPE_CHECKING:
    from slimkit.graph.groups import Group
    from slimkit.prune.edits import PrunePlan
    from slimkit.prune.prune_space import PruneSpace

__all__ = ["one_by_one"]


@door
def one_by_one(
    model: nn.Module,
    example_inputs: ExampleInputs,
    batches: Batches,
    loss: Loss,
    *,
    macs: float | None = None,
    params: float | None = None,
    every: int = 10,
    at_once: int = 1,
    normalise: Saving | None = "macs",
    optimizer: Any = None,
    **options: Any,
) -> PrunePlan:
    """Mask one channel after the other until the target is met (Liu et al. 2021, algorithm 1).

    Fisher information of the shared masks (:class:`slimkit.prune.criteria.fisher.GroupFisher`) is
    added up over ``every`` batches; the channel with the least of it per cost is masked, and the
    sum starts anew. What a channel costs is counted in the network that is left. In the end one
    plan removes what is masked; where ``round_to`` asks for it a few channels come back, the
    last to leave first, or a few more go.

    Args:
        model: not changed, unless there is an ``optimizer``.
        example_inputs: as for :func:`slimkit.prune.plan`.
        batches: training batches, read again and again.
        loss: see :mod:`slimkit.prune.batches`.
        macs: fraction of the multiply-accumulates to remove, at least.
        params: or of the parameters.
        every: batches between two removals.
        at_once: channels that leave at a removal. The paper removes one; more is faster.
        normalise: per what cost channels are compared; None for none.
        optimizer: trains ``model`` in train mode on each batch, as the paper does; afterwards
            ``slimkit.apply(model, plan, optimizer=optimizer)`` and train on. Without it the
            weights stay, and a copy in evaluation mode is looked at.
        options: of :func:`slimkit.prune.prune_space`: ignore, only, round_to, limits …

    Raises:
        InputError, PatternError, CaptureError, PlanError: as for :func:`slimkit.prune.plan`;
            no batches, or a loss that is not finite.
    """
    target = checked_target(macs=macs, params=params)
    if optimizer is not None and not hasattr(optimizer, "zero_grad"):
        raise InputError(
            f"expected an optimizer, got {type(optimizer).__name__}", where="optimizer"
        )
    for name, value in (("every", every), ("at_once", at_once)):
        if not is_number(value) or value < 1 or value != int(value):
            raise InputError(f"expected a whole number ≥ 1, got {value!r}", where=name)
    if normalise is not None:
        check_choice(normalise, Saving, where="normalise")
    choices = space(model, example_inputs, **{"criterion": Random(), **options})
    race = _Race(choices, target, normalise)
    with _masked(model, choices, loss, optimizer) as masks:
        information = torch.zeros_like(masks.alive, dtype=torch.float64)
        for step, batch in enumerate(_endless(batches, model), start=1):
            if optimizer is None:
                slopes = masks.slopes(batch, loss)
            else:
                slopes = masks.trained(batch, loss, optimizer)
            information += slopes.double().square().sum(dim=0)
            if step % every == 0:
                if race.remove(masks, information, at_once):
                    break
                information.zero_()
    return race.plan(
        masks,
        information,
        {
            target.kind: target.fraction,
            "criterion": "group_fisher",
            "round_to": choices.settings.get("round_to", 1),
            "allocation": "one_by_one",
            "every": every,
            "at_once": at_once,
            "normalise": normalise,
        },
    )


class _Race:
    """Greedy backward elimination: channels that stay, and the others in order of removal."""

    def __init__(
        self, choices: PruneSpace, target: RemovalTarget, normalise: Saving | None
    ) -> None:
        self.choices, self.target, self.normalise = choices, target, normalise
        self.kept = {group.name: group.size for group in choices.groups}
        self.least = {name: choices.allowed[name][0] for name in self.kept}
        self.gone: list[tuple[str, int]] = []
        self.limit = (1.0 - target.fraction) * self._cost(self.kept)
        if self._cost(self.least) > self.limit:
            raise choices.out_of_reach(target)

    def remove(self, masks: ChannelMasks, information: Tensor, count: int) -> bool:
        """Mask ``count`` channels; whether the target is met.

        Raises:
            PlanError: there is none left that could go.
        """
        for _ in range(count):
            worst: tuple[float, str, int] | None = None
            for group in self.choices.groups:
                saved = self._saved(group, masks)
                if self.kept[group.name] <= self.least[group.name] or not saved:
                    continue
                columns = masks.columns(group)
                alive = masks.alive[columns] > 0
                scores = torch.where(alive, information[columns] / saved, torch.inf)
                channel = int(scores.argmin())
                if worst is None or float(scores[channel]) < worst[0]:
                    worst = float(scores[channel]), group.name, channel
            if worst is None:
                raise self.choices.out_of_reach(self.target)
            _, name, channel = worst
            masks.hide(name, channel)
            self.kept[name] -= 1
            self.gone.append((name, channel))
            if self._cost(self.kept) <= self.limit:
                return True
        return False

    def plan(self, masks: ChannelMasks, information: Tensor, settings: dict[str, Any]) -> PrunePlan:
        """The plan that removes what is masked, rounded."""
        scores = {}
        for group in self.choices.groups:
            last = information[masks.columns(group)].cpu()
            scores[group.name] = len(self.gone) + last / last.max().clamp_min(1e-300)
        for turn, (name, channel) in enumerate(self.gone):
            scores[name][channel] = turn
        choices = replace(self.choices, scores=scores, settings=settings)
        if choices.legal(self.kept) == self.kept:
            return choices.plan(self.kept)

        def proposal(fraction: float) -> dict[str, int]:
            turns = self.gone[: round(fraction * len(self.gone))]
            removed = Counter(name for name, _ in turns)
            return {group.name: group.size - removed[group.name] for group in choices.groups}

        return choices.plan(choices.fit(proposal, self.target))

    def _cost(self, kept: dict[str, int]) -> float:
        return float(getattr(self.choices.cost(kept), self.target.kind))

    def _saved(self, group: Group, masks: ChannelMasks) -> float:
        """What one more channel of a group would save; 0 if nothing is known of it."""
        name = group.name
        if name not in masks.read:
            return 0.0
        if self.normalise is None:
            return 1.0
        if self.normalise == "activations":
            return masks.saved(group, "activations")
        fewer = {**self.kept, name: self.kept[name] - 1}
        return float(self.choices.cost(self.kept).macs - self.choices.cost(fewer).macs)


@contextmanager
def _masked(
    model: nn.Module, choices: PruneSpace, loss: Loss, optimizer: Any
) -> Iterator[ChannelMasks]:
    """Masks on a copy that stays as it is, or on the model itself, which is trained."""
    if optimizer is None:
        with evaluated_copy(model, loss) as twin:
            yield ChannelMasks(twin, choices.groups)
        return
    with restored_flags(model), torch.enable_grad():
        yield ChannelMasks(model.train(), choices.groups)


def _endless(batches: Batches, model: nn.Module) -> Iterator[Batch]:
    while True:
        yield from each_batch(batches, model, None)
