"""MACs and parameters of a pruned network, computed without running it.

The MACs of a convolution or linear layer are its weight's elements times the number of
places where they are used, and that number does not change when channels leave. So both
costs are sums over products of kept sizes, and a search can ask for thousands of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from slimkit.measure.macs import operator_costs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from slimkit.graph.capturing import Graph
    from slimkit.graph.groups import Group

__all__ = ["Cost", "CostModel"]


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        macs: multiply-accumulate operations for the example input.
        params: parameters, shared ones once.
    """

    macs: int
    params: int


class CostModel:
    """Costs as a function of the channels that each group keeps.

    Products of two activations (attention scores) are taken as constant: an upper bound.

    Args:
        graph: the capture of ``model``.
        model: the unpruned network.
        groups: the groups that may shrink.
    """

    def __init__(self, graph: Graph, model: nn.Module, groups: Sequence[Group]) -> None:
        weight_macs: dict[str, int] = {}
        self._fixed_macs = 0
        for operator in operator_costs(graph):
            if operator.weight is None:
                self._fixed_macs += operator.macs
            else:
                earlier = weight_macs.get(operator.weight, 0)
                weight_macs[operator.weight] = earlier + operator.macs
        self.sizes = {group.name: group.size for group in groups}
        self._numbers = {group.name: number for number, group in enumerate(groups)}
        shrinking = {slot.tensor for group in groups for slot in group.slots}
        parameters = dict(model.named_parameters())
        fixed = [p.numel() for name, p in parameters.items() if name not in shrinking]
        self._fixed_params = sum(fixed)
        self._fixed_macs += sum(m for name, m in weight_macs.items() if name not in shrinking)
        # A kernel may also be a buffer: it costs MACs and is no parameter.
        tensors = {**parameters, **dict(model.named_buffers())}
        shapes = {n: tuple(t.shape) for n, t in tensors.items() if n in shrinking}
        self._counted = np.asarray([name in parameters for name in shapes], dtype=np.float64)
        self._lay_out(shapes, weight_macs, groups)

    def _lay_out(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        weight_macs: Mapping[str, int],
        groups: Sequence[Group],
    ) -> None:
        """Flat arrays: all dimensions of all shrinking tensors, one after the other."""
        starts: dict[str, int] = {}
        sizes: list[int] = []
        for name, shape in shapes.items():
            starts[name] = len(sizes)
            sizes.extend(shape)
        entries = [
            (starts[slot.tensor] + slot.dim, number, slot.width)
            for number, group in enumerate(groups)
            for slot in group.slots
            if slot.tensor in starts
        ]
        columns: Any = list(zip(*entries, strict=True)) or [(), (), ()]
        self._dims = np.asarray(columns[0], dtype=np.int64)
        self._owners = np.asarray(columns[1], dtype=np.int64)
        self._per_channel = np.asarray(columns[2], dtype=np.float64)
        self._dim_sizes = np.asarray(sizes, dtype=np.float64)
        self._starts = np.asarray(list(starts.values()), dtype=np.int64)
        self._group_sizes = np.asarray([group.size for group in groups], dtype=np.float64)
        self._uses = np.asarray(
            [weight_macs.get(name, 0) / max(int(np.prod(shapes[name])), 1) for name in starts]
        )

    def cost(self, kept: Mapping[str, int] | None = None) -> Cost:
        """The cost when each named group keeps so many channels, the others all.

        Args:
            kept: group name → channels kept; None for the unpruned network.
        """
        elements = self._elements(kept or {})
        return Cost(
            macs=round(float(elements @ self._uses)) + self._fixed_macs,
            params=round(float(elements @ self._counted)) + self._fixed_params,
        )

    def _elements(self, kept: Mapping[str, int]) -> NDArray[np.float64]:
        """Elements left in each shrinking tensor."""
        if not len(self._starts):
            return np.zeros(0)
        removed = np.zeros(len(self._group_sizes))
        for name, count in kept.items():
            number = self._numbers[name]
            removed[number] = self._group_sizes[number] - count
        shrunk = self._per_channel * removed[self._owners]
        left = self._dim_sizes - np.bincount(
            self._dims, weights=shrunk, minlength=len(self._dim_sizes)
        )
        return np.asarray(np.multiply.reduceat(left, self._starts))
