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
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import InputError, PlanError
from slimkit.registry import Registry

if TYPE_CHECKING:
    from slimkit.graph.groups import Group, Slot

__all__ = [
    "CRITERIA",
    "FPGM",
    "BatchNormScale",
    "Criterion",
    "Magnitude",
    "Random",
    "channel_rows",
    "producer_channels",
    "scale_channels",
    "scored",
]


Reduction = Literal["mean", "sum", "max"]
"""How the scores from several members of a group become one."""


class Criterion(Protocol):
    """Group and tensors → scores ``(group.size,)``, higher = keep."""

    def __call__(self, group: Group, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Score each channel of ``group``."""


CRITERIA: Registry[Criterion] = Registry("criterion")
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


@dataclass(frozen=True)
class Magnitude:
    """The L1 or L2 norm of each filter (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

    Attributes:
        p: order of the norm, 1 or 2.
        members: ``"producers"`` scores the filters that compute a channel; ``"all"`` also the
            weights that read it and the normalisation's, the group norm of Fang et al. 2023
            ("DepGraph").
        reduction: how the norms of the members become one score.
    """

    p: float = 2.0
    members: Literal["producers", "all"] = "producers"
    reduction: Reduction = "mean"

    @property
    def summary(self) -> str:
        """One line for ``slimkit list``."""
        return f'L{self.p:g} norm of each filter (Li et al. 2017, "Pruning Filters").'

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        if self.members == "all":
            rows = [channel_rows(slot, tensors) for slot in group.slots]
        else:
            rows = producer_channels(group, tensors)
        return _reduced(
            [torch.linalg.vector_norm(r, ord=self.p, dim=1) for r in rows], self.reduction
        )


@dataclass(frozen=True)
class FPGM:
    """Distance to the other filters of the layer (He et al. 2019, "FPGM", eq. 4).

    The score of a filter is the sum of its Euclidean distances to all filters of its layer:
    one near the geometric median is replaceable by the others, whatever its norm.

    Attributes:
        reduction: how the scores from several producers become one.
    """

    reduction: Reduction = "mean"

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        # Differences instead of the faster dot products: |a|²+|b|²-2ab loses all digits for
        # filters that are nearly equal, which are the very ones to find.
        exact = "donot_use_mm_for_euclid_dist"
        distances = [
            torch.cdist(rows, rows, compute_mode=exact).sum(dim=1)
            for rows in producer_channels(group, tensors)
        ]
        return _reduced(distances, self.reduction)


@dataclass(frozen=True)
class BatchNormScale:
    """|γ| of the batch normalization behind a channel (Liu et al. 2017, "Network Slimming").

    Attributes:
        reduction: how the scales of several normalisations become one score.
    """

    reduction: Reduction = "mean"

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Score each channel of ``group``."""
        scales = [rows.abs().mean(dim=1) for rows in scale_channels(group, tensors)]
        if not scales:
            raise PlanError("no batch normalization scales these channels", where=group.name)
        return _reduced(scales, self.reduction)


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


CRITERIA.register("l1")(Magnitude(1.0))
CRITERIA.register("l2")(Magnitude(2.0))
CRITERIA.register("fpgm")(FPGM())
CRITERIA.register("bn_scale")(BatchNormScale())
CRITERIA.register("random")(Random())


def scored(criterion: Criterion, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Call ``criterion`` and check its answer.

    Returns:
        Scores ``(group.size,)``, float64 on the CPU.

    Raises:
        InputError: the answer is no tensor of that shape, or holds NaN.
    """
    name = getattr(criterion, "__name__", type(criterion).__name__)
    scores: object = criterion(group, tensors)
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


def _reduced(scores: list[Tensor], reduction: Reduction) -> Tensor:
    stacked = torch.stack(scores)
    if reduction == "sum":
        return stacked.sum(dim=0)
    if reduction == "max":
        return stacked.amax(dim=0)
    return stacked.mean(dim=0)
