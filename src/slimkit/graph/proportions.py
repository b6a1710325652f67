"""Proportions: which sets of channels keep equal fractions, and which cannot shrink at all.

Two kinds of condition come from the sizes in a model's code. A *claim* says that a dimension is
as large as a product of other sizes: ``x.reshape(b, n, c)`` with ``c`` read from another tensor.
A *fixed* product must keep its value: it scales attention scores or was compared with another
size. Both are met when all channels behind the sizes keep the same fraction and the exponents
add up; what cannot be met that way is frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Claim", "Fixed", "Proportions", "shrink_alike"]

Nodes = npt.NDArray[np.int64]
"""Sets of channels by their label, and attributes by the labels after the last one."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """A product of sizes that must keep its value.

    Attributes:
        powers: per size its nodes and its exponent.
        reason: why, for people.
    """

    powers: Sequence[tuple[Nodes, int]]
    reason: str


@dataclass(frozen=True, eq=False)
class Claim:
    """A dimension that is as large as a product of sizes, times a constant.

    Attributes:
        dim: labels of the dimension, one per position.
        powers: per size its labels (one per position) and its exponent.
        reason: why the channels stay if the claim cannot be kept.
    """

    dim: Nodes
    powers: Sequence[tuple[Nodes, int]]
    reason: str


class Proportions:
    """Sets of nodes that keep equal fractions.

    Args:
        count: number of nodes.
        frozen: node → why it cannot shrink; completed by :meth:`solve`.
    """

    def __init__(self, count: int, frozen: dict[int, str]) -> None:
        self._parent = np.arange(count)
        self.frozen = frozen
        self._members: dict[int, list[int]] = {}

    def root(self, node: int) -> int:
        """Union-find with path halving: the representative of a node's set."""
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = int(self._parent[node])
        return node

    def solve(self, claims: Sequence[Claim], fixed: Sequence[Fixed]) -> None:
        """Link and freeze until every condition holds."""
        while True:
            before = len(self.frozen), sum(len(m) for m in self._members.values())
            for condition in fixed:
                self._fix(condition)
            for claim in claims:
                self._keep(claim)
            if before == (len(self.frozen), sum(len(m) for m in self._members.values())):
                return

    def _fix(self, condition: Fixed) -> None:
        live = self._live(condition.powers, condition.reason)
        if not live:
            return
        if sum(power for _, power in live) == 0:
            self._link([nodes for nodes, _ in live])
        else:
            for nodes, _ in live:
                self._freeze(nodes, condition.reason)

    def _keep(self, claim: Claim) -> None:
        live = self._live(claim.powers, claim.reason)
        if not self._live([(claim.dim, 1)], claim.reason):
            self._fix(Fixed(live, claim.reason))
        elif not live:
            self._freeze(claim.dim, claim.reason)
        elif len(live) == 1 and live[0][1] == 1 and shrink_alike(live[0][0], claim.dim):
            return
        elif sum(power for _, power in live) == 1:
            self._link([claim.dim, *(nodes for nodes, _ in live)])
        else:
            # One of the sizes shrinks with the dimension, the others must stay.
            able = [nodes for nodes, power in live if power == 1]
            related = [nodes for nodes in able if np.isin(nodes, claim.dim).any()]
            chosen = (related or able)[:1]
            for nodes, _ in live:
                if not any(nodes is one for one in chosen):
                    self._freeze(nodes, claim.reason)

    def _live(self, powers: Iterable[tuple[Nodes, int]], reason: str) -> list[tuple[Nodes, int]]:
        """The sizes that can shrink; one of which only a part can is frozen."""
        live = []
        for nodes, power in powers:
            stuck = [self.root(n) in self.frozen for n in np.unique(nodes).tolist()]
            if any(stuck) and not all(stuck):
                self._freeze(nodes, reason)
            elif not all(stuck):
                live.append((nodes, power))
        return live

    def _freeze(self, nodes: Nodes, reason: str) -> None:
        for node in np.unique(nodes).tolist():
            self.frozen.setdefault(self.root(node), reason)

    def _link(self, sets: Sequence[Nodes]) -> None:
        nodes = np.unique(np.concatenate(sets)).tolist()
        first = self.root(nodes[0])
        for node in nodes:
            other = self.root(node)
            self._members.setdefault(first, [first])
            if other != first:
                self._parent[other] = first
                self._members[first] += self._members.pop(other, [other])
                if other in self.frozen:
                    self.frozen.setdefault(first, self.frozen[other])

    def sets(self) -> dict[int, list[int]]:
        """Root → members, of all sets that were linked."""
        return self._members

    def reason(self, node: int) -> str | None:
        """Why a node cannot shrink; ``None`` if it can."""
        return self.frozen.get(self.root(node))


def shrink_alike(first: Nodes, second: Nodes) -> bool:
    """Whether two dimensions always keep the same share: each label has an equal share."""
    labels, counts = np.unique(first, return_counts=True)
    others, other_counts = np.unique(second, return_counts=True)
    return np.array_equal(labels, others) and np.array_equal(
        counts * len(second), other_counts * len(first)
    )
