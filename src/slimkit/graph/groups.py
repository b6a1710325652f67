"""Groups: the sets of channels that can leave a network, and what leaves with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

    from slimkit.graph.capturing import Graph
    from slimkit.graph.channels import AtomArray, ChannelTracker, ParameterDim

__all__ = ["Group", "Role", "Slot", "dependency_groups"]

Role = Literal["producer", "consumer", "vector"]
"""What a tensor's dimension does for a channel: ``"producer"`` makes it (output dimension of
a convolution's weight), ``"consumer"`` reads it (input dimension), ``"vector"`` holds one
number per channel (bias, batch-norm scale and statistics, layer scale)."""


@dataclass(frozen=True, eq=False)
class Slot:
    """The places that a group's channels occupy in one dimension of one tensor.

    Attributes:
        tensor: name of the parameter or buffer (the first of tied names).
        dim: the dimension.
        role: see :data:`Role`.
        positions: integers of shape ``(size, width)``: row ``i`` holds the indices along
            ``dim`` that belong to channel ``i`` of the group. ``width`` is 1 for most
            layers, 49 for a linear layer behind a flattened 7×7 map, the number of groups
            for a grouped convolution.
    """

    tensor: str
    dim: int
    role: Role
    positions: npt.NDArray[np.int64]

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def width(self) -> int:
        """Positions per channel."""
        return int(self.positions.shape[1])

    def __str__(self) -> str:
        size, width = self.positions.shape
        return f"{self.tensor}[dim {self.dim}] {self.role}, {size} × {width}"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are alike: each can leave on its own, with its places in every slot.

    Several groups may have slots in the same dimension of a tensor (a convolution whose
    output is split in two); what is kept there is what none of them removes.

    Attributes:
        name: path of the first module that makes the channels (``"layer1.0.conv1"``), with
            ``":2"``, ``":3"`` … where one module makes the channels of several groups;
            ``"conv1 input"`` where no module makes them.
        size: the number of channels that can be removed independently; at least one stays.
        slots: all places, in order of execution.
        frozen_reason: why none can be removed, in plain language; ``None`` if they can.
        link: groups with the same link must keep equal fractions of their channels, though
            each chooses its own: a transformer's width and its heads, whose product must stay
            equal. ``None`` for most groups.
        attributes: plain numbers kept by modules that say how many there are:
            ``("blocks.0.attn", "num_heads")``. They shrink by the same fraction.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    frozen_reason: str | None = None
    link: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    @property
    def width(self) -> int:
        """Output channels of the naming layer that leave with one channel of the group."""
        return self.slots[0].width

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the modules whose output shrinks."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "producer"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Paths of the modules whose input shrinks."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "consumer"))

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all modules that own a slot."""
        return tuple(dict.fromkeys(s.module for s in self.slots))

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} channels"
        if self.width > 1:
            head += f" of {self.width}"
        if self.frozen_reason is not None:
            head += f", kept because {self.frozen_reason}"
        return "\n".join([head, *(f"  {slot}" for slot in self.slots)])


def dependency_groups(graph: Graph, model: nn.Module) -> list[Group]:
    """Find all channels of a network and what leaves with each.

    Channels that the model's output shows, that meet its input, or that an operator uses
    in a way that cannot be followed come in groups with a ``frozen_reason``; everything
    else stays free. Cost is linear in the number of channels times the layers they touch.

    Args:
        graph: what :func:`~slimkit.graph.capturing.capture` returned for ``model``.
        model: the captured model.

    Returns:
        Groups in the order in which their first layers run.
    """
    from slimkit.graph.channels import track

    return groups_of(track(graph, model))


def groups_of(tracker: ChannelTracker) -> list[Group]:
    """The groups that a finished pass of rules found."""
    labels, frozen = tracker.components()
    owners = list(tracker.parameter_dims.values())
    if not owners:
        return []
    # One row per place: which parameter dimension, which position, which component.
    owner = np.repeat(np.arange(len(owners)), [o.size for o in owners])
    position = np.concatenate([np.arange(o.size) for o in owners])
    label = np.concatenate([labels[o.start : o.start + o.size] for o in owners])
    components, component = np.unique(label, return_inverse=True)
    kinds = _kinds(owner, component, len(components), len(owners), components, frozen)

    order = np.lexsort((position, component, owner, kinds[component]))
    kind_of_row = kinds[component][order]
    starts = np.flatnonzero(np.r_[True, kind_of_row[1:] != kind_of_row[:-1]])
    groups = [
        _group(owners, owner[rows], position[rows], component[rows], components, frozen)
        for rows in np.split(order, starts[1:])
    ]
    groups.sort(key=lambda item: item[:2])
    return _named([group for _, _, group in groups])


def _kinds(
    owner: AtomArray,
    component: AtomArray,
    count: int,
    owner_count: int,
    components: AtomArray,
    frozen: dict[int, str],
) -> AtomArray:
    """A number per component, equal for those that have as many places in the same tensors."""
    generator = np.random.default_rng(0)  # a hash of the multiset of owners
    hashes = generator.integers(0, 2**62, owner_count, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    np.add.at(total, component, hashes[owner])
    reasons = {reason: i + 1 for i, reason in enumerate(dict.fromkeys(frozen.values()))}
    reason_of = np.array([reasons.get(frozen.get(c, ""), 0) for c in components.tolist()])
    spread = generator.integers(0, 2**62, len(reasons) + 1, dtype=np.uint64)
    return np.unique(total + spread[reason_of], return_inverse=True)[1]


def _group(
    owners: list[ParameterDim],
    owner: AtomArray,
    position: AtomArray,
    component: AtomArray,
    components: AtomArray,
    frozen: dict[int, str],
) -> tuple[int, int, Group]:
    """One group from its places, which are sorted by owner, component and position."""
    size = len(np.unique(component))
    slots: list[tuple[bool, int, Slot]] = []
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    for rows in np.split(np.arange(len(owner)), starts[1:]):
        index = int(owner[rows[0]])
        held = owners[index]
        role = held.role or "vector"
        places = position[rows].reshape(size, -1)
        slots.append((role != "producer", index, Slot(held.tensor, held.dim, role, places)))
    slots.sort(key=lambda item: item[:2])
    reason = frozen.get(int(components[component[0]]))
    width = slots[0][2].width
    if reason is None and size == 1:
        reason = "there is only one" if width == 1 else "they can only leave all at once"
    name = slots[0][2].module
    if slots[0][2].role == "consumer":
        name = f"{name} input"
    group = Group(name, size, tuple(slot for _, _, slot in slots), reason)
    first = slots[0][2].positions
    return slots[0][1], int(first.min()), group


def _named(groups: list[Group]) -> list[Group]:
    """Make names distinct: ``conv``, ``conv:2``, ``conv:3`` and so on."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        seen[group.name] = number = seen.get(group.name, 0) + 1
        named.append(replace(group, name=f"{group.name}:{number}") if number > 1 else group)
    return named
