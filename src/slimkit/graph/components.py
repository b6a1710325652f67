"""Connected components of channels: from ties, claims and links to the sets that leave together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.graph.channels import where
from slimkit.graph.proportions import Claim, Fixed, Nodes, Proportions
from slimkit.graph.sizes import TrackedInt

if TYPE_CHECKING:
    from slimkit.graph.channels import AtomArray, ChannelTracker

__all__ = ["Components", "components"]


@dataclass(frozen=True, eq=False)
class Components:
    """The sets of atoms that leave together.

    Attributes:
        labels: for every atom the smallest atom of its set.
        frozen: label → reason, for the sets that cannot leave.
        links: sets of labels that keep equal fractions, with the numbers of the attributes
            (see :attr:`Graph.attributes <slimkit.graph.capturing.Graph.attributes>`) that
            shrink with them.
        measured: arrays of labels along dimensions whose sizes take part in a link: the
            fraction holds for each of them as a whole.
    """

    labels: AtomArray
    frozen: dict[int, str]
    links: list[tuple[list[int], list[int]]]
    measured: list[AtomArray]

    def stuck(self, atoms: AtomArray) -> bool:
        """Whether all of these channels are frozen, or leave only all at once."""
        labels = np.unique(self.labels[atoms]).tolist()
        return len(labels) < 2 or all(label in self.frozen for label in labels)


def components(tracker: ChannelTracker) -> Components:
    """Solve everything that the rules said."""
    claims, conditions = _conditions(tracker)
    count = tracker.count
    labels = tracker.sets.labels()

    def labelled(powers: list[tuple[AtomArray, int]]) -> list[tuple[Nodes, int]]:
        return [(count - 1 - n if n[0] < 0 else labels[n], power) for n, power in powers]

    reasons = np.full(count, -1)
    for atoms, number in reversed(tracker.frozen):  # the reason given first holds
        reasons[labels[atoms]] = number
    stay = np.flatnonzero(reasons >= 0)
    given = zip(stay.tolist(), reasons[stay].tolist(), strict=True)
    frozen = {label: tracker.reasons[number] for label, number in given}
    equal = [Claim(labels[dim], labelled(powers), reason) for powers, dim, reason in claims]
    for parts, what in tracker.links:
        first, reason = labels[parts[0]], f"its size must be that of another part in {what}"
        equal += [Claim(labels[part], [(first, 1)], reason) for part in parts[1:]]
    fixed = [Fixed(labelled(powers), reason) for powers, reason in conditions]
    proportions = Proportions(count + len(tracker.graph.attributes), frozen)
    proportions.solve(equal, fixed)
    links = []
    for root, members in proportions.sets().items():
        why = proportions.frozen.get(root)
        within = [node for node in members if node < count]
        if why is None:
            links.append((within, [node - count for node in members if node >= count]))
            continue
        for label in within:
            frozen.setdefault(label, why)
    linked = {label for within, _ in links for label in within}
    dims = [claim.dim for claim in equal]
    dims += [nodes for claim in equal for nodes, _ in claim.powers if nodes[0] < count]
    measured = [dim for dim in dims if linked and not linked.isdisjoint(np.unique(dim).tolist())]
    return Components(labels, frozen, links, measured)


def _conditions(
    tracker: ChannelTracker,
) -> tuple[
    list[tuple[list[tuple[AtomArray, int]], AtomArray, str]],
    list[tuple[list[tuple[AtomArray, int]], str]],
]:
    """Claims on dimensions of channels, and products that must keep their value."""
    claims, fixed = [], []
    claimed = set()
    for call, size, dim, what in tracker.claims:
        claimed.add((call, id(size)))
        powers, reason = tracker.powers(size.powers), f"its size is computed in {what}"
        if dim is None:
            fixed.append((powers, reason))
        else:
            claims.append((powers, dim, reason))
    reason = "its size enters a computation in Python"
    fixed += [(tracker.powers(product), reason) for product in dict.fromkeys(tracker.graph.fixed)]
    for call_ in tracker.graph.calls:
        for size in _tracked_ints((call_.args, call_.kwargs)):
            if (call_.index, id(size)) not in claimed:
                reason = f"its size shapes another tensor, in {where(call_)}"
                fixed.append((tracker.powers(size.powers), reason))
    return claims, [(powers, reason) for powers, reason in fixed if powers]


def _tracked_ints(argument: Any) -> Iterator[TrackedInt]:
    if isinstance(argument, TrackedInt):
        yield argument
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _tracked_ints(item)
    elif isinstance(argument, dict):
        yield from _tracked_ints(list(argument.values()))
    elif isinstance(argument, slice):
        yield from _tracked_ints((argument.start, argument.stop, argument.step))
