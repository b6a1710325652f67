"""Union-find over arrays: disjoint sets of integers, joined whole arrays at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["DisjointSets"]

Array = npt.NDArray[np.int64]


class DisjointSets:
    """Sets of the integers 0 … n − 1, where n grows; joined position by position.

    Union-find whose find and union work on arrays. Networks tie long runs of fresh channels
    to runs that exist already, and such a pair of arrays is joined by one assignment. Pairs in
    which a set stands twice (shuffles, repeats) are kept, and joined by SciPy at the end.

    Attributes:
        size: n.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parent = np.arange(1024)
        self._rest: list[tuple[Array, Array]] = []

    def grow(self, count: int) -> None:
        """Add ``count`` integers, each a set of its own."""
        self.size += count
        held = len(self._parent)
        if self.size > held:
            more = np.arange(held, max(self.size, 2 * held))
            self._parent = np.concatenate([self._parent, more])

    def join(self, first: Array, second: Array) -> None:
        """Join the sets of ``first[k]`` and ``second[k]`` for every k."""
        low, high = self._roots(first), self._roots(second)
        differ = low != high
        if not differ.any():
            return
        if not differ.all():
            low, high = low[differ], high[differ]
        if low.min() > high.min():
            low, high = high, low
        if low.max() < high.min() and bool((high[1:] > high[:-1]).all()):
            self._parent[high] = low  # every set of ``high`` once, and none of them in ``low``
        else:
            self._rest.append((low, high))

    def labels(self) -> Array:
        """For every integer the smallest of its set."""
        everything = np.arange(self.size)
        roots = self._roots(everything)
        if self._rest:
            from scipy.sparse import coo_matrix
            from scipy.sparse.csgraph import connected_components

            first = self._roots(np.concatenate([low for low, _ in self._rest]))
            second = self._roots(np.concatenate([high for _, high in self._rest]))
            nodes, places = np.unique(np.concatenate([first, second]), return_inverse=True)
            ends = places[: len(first)], places[len(first) :]
            ties = coo_matrix((np.ones(len(first), dtype=np.int8), ends), shape=2 * (len(nodes),))
            number, component = connected_components(ties, directed=False)
            lead = np.zeros(number, dtype=np.int64)
            lead[component[::-1]] = nodes[::-1]  # the last assignment holds: the smallest
            self._parent[nodes] = lead[component]
            self._rest = []
            roots = self._roots(everything)
        return roots

    def _roots(self, members: Array) -> Array:
        """Find, with path compression: the representative of each member's set."""
        roots = self._parent[members]
        above = self._parent[roots]
        if np.array_equal(roots, above):
            return roots
        while not np.array_equal(roots, above):
            roots, above = above, self._parent[above]
        self._parent[members] = roots
        return roots
