"""Criteria from gradients: what the loss would lose with a channel, estimated by derivatives.

Each holds training batches and a loss, and looks at them once, before it scores::

    plan = sk.prune.plan(model, images, macs=0.5, criterion=sk.prune.Taylor(batches, loss))

What ``batches`` and ``loss`` may be is said in :mod:`slimkit.prune.batches`. The network is run in
evaluation mode, and on a copy: its gradients, flags, buffers and the random state stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.inputs import Batch
from slimkit.prune.batches import (
    Batches,
    Loss,
    each_batch,
    evaluated_copy,
    loss_of,
    samples_of,
)
from slimkit.prune.criteria.scores import (
    Criterion,
    FixedScores,
    Members,
    Reduction,
    channel_sums,
    check_choice,
    reduced,
)

if TYPE_CHECKING:
    from slimkit.graph.groups import Group, Slot

__all__ = ["OBD", "UNSEEN", "Taylor", "not_prepared"]

UNSEEN = "the loss does not depend on these channels"


@door
@dataclass(frozen=True, eq=False)
class Taylor:
    """How much the loss would change without a channel, to first order (Molchanov et al. 2019).

    The change is Σ g·w over the weights w of the channel and their gradients g
    ("Importance Estimation for Neural Network Pruning", eq. 8), here in absolute value, in the
    mean over the batches.

    Attributes:
        batches, loss: see :mod:`slimkit.prune.batches`.
        members: ``"producers"`` sums over the layers that compute a channel; ``"all"`` over
            every parameter that leaves with it.
        reduction: ``"joint"`` adds up the members before the absolute value is taken; else
            each member has a score, and the scores are reduced.
        squared: square the change per batch, as the paper does: batches on which a channel
            matters much count more.
        max_batches: look at so many batches; None for all.
    """

    batches: Batches = field(repr=False)
    loss: Loss = field(repr=False)
    members: Members = "producers"
    reduction: Reduction | Literal["joint"] = "joint"
    squared: bool = False
    max_batches: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.members, Members, where="members")
        if self.reduction != "joint":
            check_choice(self.reduction, Reduction, where="reduction")

    def prepare(self, model: nn.Module, groups: Sequence[Group]) -> Criterion:
        """Score ``groups`` on the batches.

        Raises:
            InputError, DataError: no batches, a batch of another form, a loss that is not
                finite, no scalar, or does not depend on the parameters.
        """
        totals: dict[str, Tensor] = {}
        count = 0
        with _Gradients(model, groups, self.members, self.loss) as gradients:
            for batch in each_batch(self.batches, model, self.max_batches):
                count += 1
                found = gradients.of(batch)
                for group in groups:
                    parts = [
                        channel_sums(slot, weight.float() * slope.float())
                        for slot, weight, slope in gradients.members(group, found)
                    ]
                    if parts:
                        _add(totals, group.name, self._change(parts))
        return _fixed(self, {name: total / count for name, total in totals.items()}, groups)

    def _change(self, parts: Sequence[Tensor]) -> Tensor:
        if self.reduction == "joint":
            change = torch.stack(list(parts)).sum(dim=0).abs()
        else:
            change = reduced([part.abs() for part in parts], self.reduction)
        return change.square() if self.squared else change

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Not before :meth:`prepare`."""
        raise not_prepared(self)


@door
@dataclass(frozen=True, eq=False)
class OBD:
    """Second-order saliency: Σ h·w²/2 over the weights of a channel (LeCun et al. 1990, eq. 5).

    The diagonal h of the Hessian is the empirical Fisher information, the mean over the
    samples of the squared gradient.

    Attributes:
        batches, loss: see :mod:`slimkit.prune.batches`.
        members: ``"producers"`` looks at the layers that compute a channel; ``"all"`` at every
            parameter that leaves with it.
        reduction: how the saliencies of the members become one.
        per_sample: take the gradient of each sample alone, which is exact; else that of each
            batch, which is as many times faster as a batch has samples and keeps little but
            the order of magnitude.
        max_batches: look at so many batches; None for all.
    """

    batches: Batches = field(repr=False)
    loss: Loss = field(repr=False)
    members: Members = "producers"
    reduction: Reduction = "sum"
    per_sample: bool = True
    max_batches: int | None = None

    def __post_init__(self) -> None:
        check_choice(self.members, Members, where="members")
        check_choice(self.reduction, Reduction, where="reduction")

    def prepare(self, model: nn.Module, groups: Sequence[Group]) -> Criterion:
        """Score ``groups`` on the batches.

        Raises:
            InputError, DataError: as for :meth:`Taylor.prepare`; a batch that cannot be taken
                apart into samples.
        """
        information: dict[str, Tensor] = {}
        count = 0
        with _Gradients(model, groups, self.members, self.loss) as gradients:
            for batch in each_batch(self.batches, model, self.max_batches):
                for part in samples_of(batch) if self.per_sample else [batch]:
                    count += 1
                    for name, slope in gradients.of(part).items():
                        _add(information, name, slope.double().square())
            scores = {}
            for group in groups:
                parts = [
                    channel_sums(slot, weight.double().square() * squares / (2 * count))
                    for slot, weight, squares in gradients.members(group, information)
                ]
                if parts:
                    scores[group.name] = reduced(parts, self.reduction)
        return _fixed(self, scores, groups)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Not before :meth:`prepare`."""
        raise not_prepared(self)


class _Gradients:
    """Gradients of a loss with respect to the parameters of groups, on a copy of the model."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], members: Members, loss: Loss
    ) -> None:
        self._loss = loss
        self._context = evaluated_copy(model, loss)
        self._slots = {group.name: _parameter_slots(group, model, members) for group in groups}

    def __enter__(self) -> _Gradients:
        self._model = self._context.__enter__()
        named = dict(self._model.named_parameters())
        used = dict.fromkeys(slot.tensor for slots in self._slots.values() for slot in slots)
        self._parameters = {name: named[name].requires_grad_(True) for name in used}
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Name → gradient, of those parameters that the loss depends on."""
        value = loss_of(self._model, batch, self._loss)
        slopes = torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
        found: dict[str, Tensor | None] = dict(zip(self._parameters, slopes, strict=True))
        return {name: slope for name, slope in found.items() if slope is not None}

    def members(
        self, group: Group, found: Mapping[str, Tensor]
    ) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """Slot, parameter and what was found for it, for the members of ``group``."""
        for slot in self._slots[group.name]:
            if slot.tensor in found:
                yield slot, self._parameters[slot.tensor].detach(), found[slot.tensor]


def _parameter_slots(group: Group, model: nn.Module, members: Members) -> list[Slot]:
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    slots = [slot for slot in group.slots if slot.tensor in parameters]
    if members == "all":
        return slots
    weights = [slot for slot in slots if parameters[slot.tensor].dim() > 1]
    return [slot for slot in weights if slot.role == "producer"] or weights or slots


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach().double()
    totals[name] = totals[name] + value if name in totals else value


def _fixed(criterion: object, scores: Mapping[str, Tensor], groups: Sequence[Group]) -> FixedScores:
    reasons = {group.name: UNSEEN for group in groups if group.name not in scores}
    return FixedScores({n: s.cpu() for n, s in scores.items()}, reasons, type(criterion).__name__)


def not_prepared(criterion: object) -> InputError:
    """The error of a criterion that was asked for scores before it looked at data."""
    name = type(criterion).__name__
    return InputError(
        f"{name} has not looked at its batches yet",
        where="criterion",
        hint=f"call {name}.prepare(model, groups), as slimkit.prune.plan does",
    )
