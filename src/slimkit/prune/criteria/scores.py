"""Criteria: which channels matter. A criterion gives every channel of a group a score.

A criterion is any callable ``criterion(group, tensors) -> scores``: it gets a group of
channels that must leave together and all tensors of the model by name, and answers with one
number per channel, shape ``(group.size,)``; higher means keep. Raising
:class:`~slimkit.errors.PlanError` leaves that group as it is, with the message as the reason.
Register one by name::

    @CRITERIA.register("mean_magnitude")
    def mean_magnitude(group, tensors):
        rows = [channels.abs().mean(dim=1) for channels in producer_channels(group, tensors)]
        return torch.stack(rows).mean(dim=0)

A criterion that needs more than the weights has a method ``prepare(model, groups)``: it is
called once with the unpruned model and all groups that may be pruned, and returns the
criterion that scores. Those of :mod:`slimkit.prune.criteria.gradients` and
:mod:`slimkit.prune.criteria.fisher` look at training data there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.errors import InputError, PlanError, nearest
from slimkit.outside import called
from slimkit.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from slimkit.graph.groups import Group, Slot

__all__ = [
    "CRITERIA",
    "FPGM",
    "BatchNormScale",
    "Criterion",
    "FixedScores",
    "Magnitude",
    "Members",
    "Normalisation",
    "Normalised",
    "Random",
    "Reduction",
    "channel_rows",
    "channel_sums",
    "check_choice",
    "prepared",
    "producer_channels",
    "reduced",
    "scale_channels",
    "scored",
    "weight_slots",
]


Reduction = Literal["mean", "sum", "max", "prod", "first"]
"""How the scores from several members of a group become one; ``"first"`` takes that of the
member that runs first."""

Members = Literal["producers", "all"]
"""Which members of a group are looked at: the layers that compute its channels, or also
those that read and scale them."""

Normalisation = Literal["none", "mean", "max", "sum", "std", "gaussian"]
"""What the scores of a group are divided by; ``"gaussian"`` subtracts their mean first and
divides by their standard deviation."""


def check_choice(value: object, choices: object, *, where: str) -> None:
    """Check that ``value`` is one of a ``Literal``'s values.

    Raises:
        InputError: it is not.
    """
    if value not in get_args(choices):
        raise InputError(
            f"unknown choice {value!r}", where=where, hint=nearest(str(value), get_args(choices))
        )


class Criterion(Protocol):
    """Group and tensors → scores ``(group.size,)``, higher = keep."""

    def __call__(self, group: Group, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Score each channel of ``group``."""


CRITERIA: Registry[Criterion] = Registry("criterion", fits=callable)
"""Name → criterion."""


def channel_rows(slot: Slot, tensors: Mapping[str, Tensor]) -> Tensor:
    """What of the slot's tensor belongs to each channel.

    Returns:
        Shape ``(channels, elements)`` in float32: all elements of ``slot.tensor`` whose
        index along ``slot.dim`` belongs to the channel, flattened.
    """
    tensor = tensors[slot.tensor].detach().float()
    rows = tensor.movedim(slot.dim, 0).reshape(tensor.shape[slot.dim], -1)
    positions = slot.positions.reshape(-1)
    if not np.array_equal(positions, np.arange(len(rows))):  # most often they are all, in order
        rows = rows[torch.as_tensor(positions, device=tensor.device)]
    return rows.reshape(len(slot.positions), -1)


def producer_channels(group: Group, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The filters of each layer that produces the group's channels.

    Returns:
        One matrix ``(group.size, elements)`` per producer: row c holds the weights that
        compute channel c (for a convolution ``in_channels / groups × kernel`` of them).
        Where nothing produces the channels (a learned table), all weights that hold them.
    """
    weights = [slot for slot in group.slots if tensors[slot.tensor].dim() > 1]
    written = [slot for slot in weights if slot.role == "producer"]
    return [channel_rows(slot, tensors) for slot in written or weights or group.slots]


def weight_slots(group: Group, tensors: Mapping[str, Tensor]) -> list[Slot]:
    """The slots of weights and scales: all but those of biases and of running statistics.

    Where there is nothing else, all slots.
    """

    def is_weight(slot: Slot) -> bool:
        local = slot.tensor.rpartition(".")[2]
        return tensors[slot.tensor].dim() > 1 or not ("bias" in local or "running_" in local)

    return [slot for slot in group.slots if is_weight(slot)] or list(group.slots)


def channel_sums(slot: Slot, tensor: Tensor) -> Tensor:
    """Sum what belongs to each channel of ``slot``.

    Args:
        slot: a place of a group.
        tensor: of the shape of the slot's tensor.

    Returns:
        Shape ``(channels,)``.
    """
    others = [dim for dim in range(tensor.dim()) if dim != slot.dim]
    sums = tensor.sum(dim=others) if others else tensor
    return sums[torch.as_tensor(slot.positions, device=tensor.device)].sum(dim=1)


def scale_channels(group: Group, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The scale γ of each batch normalization over the group's channels.

    Returns:
        One matrix ``(group.size, positions)`` per batch norm; none if there is no such layer.
    """
    found = []
    for slot in group.slots:
        layer, _, name = slot.tensor.rpartition(".")
        if name == "weight" and f"{layer}.running_mean" in tensors:
            found.append(channel_rows(slot, tensors))
    return found


@door
@dataclass(frozen=True)
class Magnitude:
    """The L1 or L2 norm of each filter (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

    Attributes:
        p: order of the norm, 1 or 2.
        members: ``"producers"`` scores the filters that compute a channel; ``"all"`` also the
            weights that read it and the normalisation's scale, the group norm of Fang et al.
            2023 ("DepGraph"). Biases and running statistics never count.
        reduction: how the norms of the members become one score.
    """

    p: float = 2.0
    members: Members = "producers"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_choice(self.members, Members, where="members")
        check_choice(self.reduction, Reduction, where="reduction")

    @property
    def summary(self) -> str:
        """One line for ``slimkit list``."""
        if self.members == "all":
            return f'L{self.p:g} norm of all weights of a channel (Fang et al. 2023, "DepGraph").'
        return f'L{self.p:g} norm of each filter (Li et al. 2017, "Pruning Filters").'

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        if self.members == "all":
            rows = [channel_rows(slot, tensors) for slot in weight_slots(group, tensors)]
        else:
            rows = producer_channels(group, tensors)
        norms = [torch.linalg.vector_norm(r, ord=self.p, dim=1) for r in rows]
        return reduced(norms, self.reduction)


@door
@dataclass(frozen=True)
class FPGM:
    """Distance to the other filters of the layer (He et al. 2019, "FPGM", eq. 4).

    The score of a filter is the sum of its Euclidean distances to all filters of its layer:
    one near the geometric median is replaceable by the others, whatever its norm.

    Attributes:
        reduction: how the scores from several producers become one.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, Reduction, where="reduction")

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        # Differences instead of the faster dot products: |a|²+|b|²-2ab loses all digits for
        # filters that are nearly equal, which are the very ones to find.
        exact = "donot_use_mm_for_euclid_dist"
        distances = [
            torch.cdist(rows, rows, compute_mode=exact).sum(dim=1)
            for rows in producer_channels(group, tensors)
        ]
        return reduced(distances, self.reduction)


@door
@dataclass(frozen=True)
class BatchNormScale:
    """|γ| of the batch normalization behind a channel (Liu et al. 2017, "Network Slimming").

    Attributes:
        reduction: how the scales of several normalisations become one score.
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_choice(self.reduction, Reduction, where="reduction")

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        scales = [rows.abs().mean(dim=1) for rows in scale_channels(group, tensors)]
        if not scales:
            raise PlanError("no batch normalization scales these channels", where=group.name)
        return reduced(scales, self.reduction)


@door
@dataclass(frozen=True)
class Random:
    """Random scores: the control that every other criterion must beat.

    Attributes:
        seed: same seed and group name, same scores.
    """

    seed: int = 0

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        digest = hashlib.sha256(f"{self.seed}|{group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(group.size, generator=generator)


@door
@dataclass(frozen=True)
class Normalised:
    """Another criterion's scores, divided within each group so that groups can be compared.

    Attributes:
        criterion: a name or a criterion.
        by: see :data:`Normalisation`. Scores that are all equal have no deviation: they
            become 0 by ``"gaussian"``, and by ``"std"`` what they become by ``"mean"``.

    Raises:
        InputError, UnknownNameError: there is no such normalisation or criterion.
    """

    criterion: str | Criterion
    by: Normalisation = "mean"

    def __post_init__(self) -> None:
        check_choice(self.by, Normalisation, where="by")
        if isinstance(self.criterion, str):
            CRITERIA.get(self.criterion, where="criterion")

    def prepare(self, model: nn.Module, groups: Sequence[Group]) -> Criterion:
        """Prepare the criterion inside."""
        return Normalised(prepared(self._inner, model, groups), self.by)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        scores = scored(self._inner, group, tensors)
        if self.by == "none":
            return scores
        mean, deviation = scores.mean(), scores.std(correction=0)
        if deviation <= _EQUAL * scores.abs().amax():
            deviation = torch.zeros_like(deviation)
            scores = mean.expand_as(scores)
        if self.by == "gaussian":
            return (scores - mean) / _divisor(deviation)
        if self.by == "std":
            return scores / _divisor(deviation if deviation > 0 else mean)
        largest = {"mean": mean, "max": scores.amax(), "sum": scores.sum()}
        return scores / _divisor(largest[self.by])

    @property
    def _inner(self) -> Criterion:
        return CRITERIA.get(self.criterion) if isinstance(self.criterion, str) else self.criterion


_EQUAL = 1e-12
"""A deviation below this part of the largest score is rounding of float64: they are equal."""


def _divisor(value: Tensor) -> Tensor:
    """``value``, or 1 where it is 0 and there is nothing to divide."""
    return torch.where(value == 0, torch.ones_like(value), value)


@door
@dataclass(frozen=True, eq=False)
class FixedScores:
    """Scores that were computed before.

    Attributes:
        scores: group name → scores ``(group.size,)``.
        reasons: group name → why that group has none and stays as it is.
        source: what computed them, for people.
    """

    scores: Mapping[str, Tensor] = field(repr=False)
    reasons: Mapping[str, str] = field(default_factory=dict, repr=False)
    source: str = "scores"

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Look up the scores of ``group``."""
        if group.name not in self.scores:
            raise PlanError(
                self.reasons.get(group.name, f"{self.source} has no scores for it"),
                where=group.name,
            )
        return self.scores[group.name]


def prepared(criterion: Criterion, model: nn.Module, groups: Sequence[Group]) -> Criterion:
    """The criterion that scores: what ``criterion.prepare`` returns, if it has one."""
    prepare: Callable[[nn.Module, Sequence[Group]], Criterion] | None
    prepare = getattr(criterion, "prepare", None)
    return criterion if prepare is None else prepare(model, groups)


CRITERIA.register("l1")(Magnitude(1.0))
CRITERIA.register("l2")(Magnitude(2.0))
CRITERIA.register("group_l2")(Magnitude(2.0, members="all"))
CRITERIA.register("fpgm")(FPGM())
CRITERIA.register("bn_scale")(BatchNormScale())
CRITERIA.register("random")(Random())
for _name, _class in {"taylor": "Taylor", "group_fisher": "GroupFisher", "obd": "OBD"}.items():
    CRITERIA.mention(
        _name,
        "it looks at gradients, so it needs training batches and a loss",
        hint=f"criterion=slimkit.prune.{_class}(batches, loss)",
    )


def scored(criterion: Criterion, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Call ``criterion`` and check its answer.

    Returns:
        Scores ``(group.size,)``, float64 on the CPU.

    Raises:
        InputError: the answer is no tensor of that shape, or holds NaN.
    """
    name = getattr(criterion, "__name__", type(criterion).__name__)
    scores: object = called(criterion, InputError, "criterion", group, tensors)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != (group.size,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"{name} must give one score per channel, shape ({group.size},) for "
            f"{group.name}, and gave {shape}",
            where="criterion",
        )
    if bool(torch.isnan(scores).any()):
        raise InputError(f"{name} gave NaN scores for {group.name}", where="criterion")
    return scores.detach().to("cpu", torch.float64)


def reduced(scores: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """One score per channel from those of several members, each of shape ``(channels,)``."""
    stacked = torch.stack(list(scores))
    if reduction == "first":
        return stacked[0]
    if reduction == "max":
        return stacked.amax(dim=0)
    if reduction == "prod":
        return stacked.prod(dim=0)
    return stacked.sum(dim=0) if reduction == "sum" else stacked.mean(dim=0)
