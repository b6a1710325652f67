"""Record and replay of data-dependent decisions: what a network compares, sorts or suppresses.

Two forwards that agree to rounding can still part at a comparison of nearly equal numbers, and
then nothing behind it can be compared. So the first forward notes every operator that turns
fractions into whole numbers or truth values, and the second takes its outcome over, while the
numbers that went in are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from slimkit.graph.addressing import AddressMode
from slimkit.graph.call_table import CallTable
from slimkit.graph.capturing import Graph, Op, tensors_in

__all__ = ["Addresses", "Decisions", "largest_difference", "ops_by_address"]

Key = tuple[str, int]
"""Address of the call that issued an operator, and how many it had issued before."""


class Addresses(AddressMode):
    """Knows which call is running, so that operators of two forwards can be matched.

    Args:
        model: what runs.
        table: of the capture that both forwards are compared with.
    """

    def __init__(self, model: nn.Module, table: CallTable) -> None:
        super().__init__(model, table)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self._address = ""
        self._issued: dict[str, int] = {}

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Remember the address while the function runs."""
        self._address = address
        try:
            return func(*args, **kwargs)
        finally:
            self._address = ""

    def next_operator(self) -> Key:
        """The key of the operator that is about to run."""
        number = self._issued.get(self._address, 0)
        self._issued[self._address] = number + 1
        return self._address, number


def ops_by_address(graph: Graph) -> dict[Key, Op]:
    """The operators of a capture under the keys that :class:`Addresses` gives."""
    found: dict[Key, Op] = {}
    issued: dict[str, int] = {}
    for op in graph.ops:
        address = graph.calls[op.call].address if op.call >= 0 else ""
        number = issued.get(address, 0)
        issued[address] = number + 1
        found[address, number] = op
    return found


class Decisions:
    """What was decided in one forward, and from which numbers.

    Args:
        table: of the capture of the network.
    """

    def __init__(self, table: CallTable) -> None:
        self._table = table
        self._taken: dict[Key, tuple[list[Tensor], Any]] = {}

    def note(self, key: Key, func: Any, arguments: Any, result: Any) -> None:
        """Keep the operator's outcome if it is a decision."""
        if not _may_decide(func):
            return
        fractions = [t for t in tensors_in(arguments) if t.is_floating_point()]
        outcomes = list(tensors_in(result))
        whole = [t for t in outcomes if not t.is_floating_point()]
        if fractions and (whole or isinstance(result, float | int)):
            kept = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, result)
            self._taken[key] = [t.clone() for t in fractions], kept

    def replay(self, model: nn.Module) -> Replay:
        """A mode for the second forward."""
        return Replay(model, self._table, self._taken)


def _may_decide(func: torch._ops.OpOverload) -> bool:
    """Whether the operator can decide: not those that only make a tensor like another."""
    name = str(func).split(".")[1]
    return not name.endswith(("_like", "_with_indices")) and name not in ("empty", "embedding")


class Replay(TorchDispatchMode):
    """Takes decisions over.

    Attributes:
        count: how many were.
        worst: largest difference of the numbers behind one, as a fraction of their size.
    """

    def __init__(
        self, model: nn.Module, table: CallTable, taken: Mapping[Key, tuple[list[Tensor], Any]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._addresses = Addresses(model, table)
        self._taken = taken
        self.count = 0
        self.worst = 0.0

    def __enter__(self) -> Replay:
        self._addresses.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._addresses.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        taken = self._taken.get(self._addresses.next_operator())
        if taken is not None and _may_decide(func):
            fractions = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
            numbers, outcome = taken
            if [t.shape for t in fractions] == [t.shape for t in numbers]:
                self.count += 1
                for found, expected in zip(fractions, numbers, strict=True):
                    self._compare(found, expected)
                return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, outcome)
        return func(*args, **kwargs)

    def _compare(self, found: Tensor, expected: Tensor) -> None:
        finite = expected[torch.isfinite(expected)]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        self.worst = max(self.worst, largest_difference(found, expected) / (size or 1.0))


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Of two tensors element by element; infinite if shapes, NaN or infinities differ."""
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    first, second = first.double(), second.double()
    difference = (first - second).abs()
    difference[first == second] = 0.0  # equal infinities
    worst = float(difference.max())
    return worst if worst == worst else float("inf")  # noqa: PLR0124 - NaN
