"""Dependency groups: connected components of channels become groups of slots.

Components that are alike (as many places in the same tensors) form one group, found by sorting
and hashing whole arrays, so that the cost stays linear in the number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from slimkit.doors import structure_door
from slimkit.graph.capturing import Graph
from slimkit.graph.channels import AtomArray, ChannelTracker, ParameterDim
from slimkit.graph.components import Components, components
from slimkit.graph.groups import AttentionPart, Group, Slot
from slimkit.graph.isolation import uncollected
from slimkit.graph.tracking import track

__all__ = ["dependency_groups", "groups_of"]


@structure_door
@uncollected()
def dependency_groups(
    graph: Graph,
    model: nn.Module,
    attention: AttentionPart | None = None,
    protected: Mapping[int, str] | None = None,
) -> list[Group]:
    """Find all channels of a network and what leaves with each.

    Channels that the model's output shows, that meet its input, or that an operator uses
    in a way that cannot be followed come in groups with a ``frozen_reason``; everything
    else stays free. Cost is linear in the number of channels times the layers they touch.

    Args:
        graph: what :func:`~slimkit.graph.capturing.capture` returned for ``model``.
        model: the captured model.
        attention: whether whole heads (``"heads"``) or channels of every head
            (``"channels"``) form the groups of an attention, where both can leave.
        protected: value number → why its channels stay, beside what the capture itself shows;
            see :func:`~slimkit.graph.unseen.protected_values`.

    Returns:
        Groups in the order in which their first layers run.
    """
    return groups_of(track(graph, model, attention, protected))


def groups_of(tracker: ChannelTracker) -> list[Group]:
    """The groups that a finished pass of rules found."""
    found = components(tracker)
    owners = list(tracker.parameter_dims.values())
    if not owners:
        return []
    # One row per place: which parameter dimension, which position, which component.
    owner = np.repeat(np.arange(len(owners)), [o.size for o in owners])
    position = np.concatenate([np.arange(o.size) for o in owners])
    label = np.concatenate([found.labels[o.start : o.start + o.size] for o in owners])
    held = np.bincount(label) > 0
    sets, component = np.flatnonzero(held), (np.cumsum(held) - 1)[label]
    kinds = _kinds(owner, component, len(owners), sets, found)
    made = []
    for rows in _sorted_rows(owner, position, component, kinds[component]):
        group = _group(owners, owner[rows], position[rows], component[rows])
        if group is not None:
            first = int(sets[component[rows[0]]])
            made.append((group, first, found.frozen.get(first)))
    made.sort(key=lambda item: item[0][:2])
    named = _named([group for (_, _, group), _, _ in made])
    return _linked(
        [
            replace(group, frozen_reason=reason or _lone(group))
            for group, (_, _, reason) in zip(named, made, strict=True)
        ],
        [first for _, first, _ in made],
        found,
        tracker.graph.attributes,
    )


def _sorted_rows(
    owner: AtomArray, position: AtomArray, component: AtomArray, kind: AtomArray
) -> list[AtomArray]:
    """The rows of each kind, sorted by owner, component and position.

    They come sorted by owner and position; mostly that is the order of the components, too.
    """
    small = kind.astype(np.uint16) if kind.max() < 2**16 else kind  # sorted in linear time
    order = np.argsort(small, kind="stable")
    kind, owner, component = kind[order], owner[order], component[order]
    new = kind[1:] != kind[:-1]
    falls = (component[1:] < component[:-1]) & (owner[1:] == owner[:-1]) & ~new
    if falls.any():
        again = np.flatnonzero(np.isin(kind, kind[1:][falls]))
        keys = position[order[again]], component[again], owner[again], kind[again]
        order[again] = order[again][np.lexsort(keys)]
    return np.split(order, np.flatnonzero(new) + 1)


def _kinds(
    owner: AtomArray, component: AtomArray, owner_count: int, sets: AtomArray, found: Components
) -> AtomArray:
    """A number per component, equal for those that are alike.

    They have as many places in the same tensors, the same reason to stay, and the same part
    in the dimensions whose sizes are linked.
    """
    generator = np.random.default_rng(0)  # a hash of the multiset of owners
    hashes = generator.integers(0, 2**62, owner_count, dtype=np.uint64)
    total = np.zeros(len(sets), dtype=np.uint64)
    np.add.at(total, component, hashes[owner])
    frozen = found.frozen
    reasons = {reason: i + 1 for i, reason in enumerate(dict.fromkeys(frozen.values()))}
    reason_of = np.array([reasons.get(frozen.get(label, ""), 0) for label in sets.tolist()])
    spread = generator.integers(0, 2**62, len(reasons) + 1, dtype=np.uint64)
    total += spread[reason_of]
    for dim in found.measured:
        inside = np.searchsorted(sets, dim)
        inside = inside[(inside < len(sets)) & (sets[np.minimum(inside, len(sets) - 1)] == dim)]
        np.add.at(total, inside, generator.integers(0, 2**62, 1, dtype=np.uint64))
    return np.unique(total, return_inverse=True)[1]


def _group(
    owners: list[ParameterDim], owner: AtomArray, position: AtomArray, component: AtomArray
) -> tuple[int, int, Group] | None:
    """One group from its places, which are sorted by owner, component and position.

    Returns:
        Where its first layer stands among the owners, its first position there, the group;
        ``None`` if it has no place in a tensor.
    """
    parts = np.split(np.arange(len(owner)), np.flatnonzero(owner[1:] != owner[:-1]) + 1)
    size = 1 + int(np.count_nonzero(np.diff(component[parts[0]])))  # each owner holds them all
    slots: list[tuple[bool, int, Slot]] = []
    sizes: list[Slot] = []
    for rows in parts:
        index = int(owner[rows[0]])
        held = owners[index]
        role = held.role or "vector"
        slot = Slot(held.tensor, held.dim, role, position[rows].reshape(size, -1))
        if role == "size":
            sizes.append(slot)
        else:
            slots.append((role != "producer", index, slot))
    if not slots:
        return None
    slots.sort(key=lambda item: item[:2])
    name = slots[0][2].module
    if slots[0][2].role == "consumer":
        name = f"{name} input"
    group = Group(name, size, tuple(slot for _, _, slot in slots), sizes=tuple(sizes))
    return slots[0][1], int(slots[0][2].positions.min()), group


def _lone(group: Group) -> str | None:
    """Why a group of one set of channels stays."""
    if group.size > 1:
        return None
    return "there is only one" if group.width == 1 else "they can only leave all at once"


def _linked(
    groups: list[Group],
    labels: list[int],
    found: Components,
    attributes: Sequence[tuple[str, str, int]],
) -> list[Group]:
    """The groups with their links, and with the attributes that follow the links."""
    for members, numbers in found.links:
        inside = set(members)
        chosen = [i for i, label in enumerate(labels) if label in inside]
        if not chosen:
            continue
        lead = groups[chosen[0]]
        counted = tuple(attributes[number] for number in numbers)
        for i in chosen:
            link = lead.name if len(chosen) > 1 else None
            groups[i] = replace(groups[i], link=link, attributes=counted if i == chosen[0] else ())
    return groups


def _named(groups: list[Group]) -> list[Group]:
    """Make names distinct: ``conv``, ``conv:2``, ``conv:3`` and so on."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        seen[group.name] = number = seen.get(group.name, 0) + 1
        named.append(replace(group, name=f"{group.name}:{number}") if number > 1 else group)
    return named
