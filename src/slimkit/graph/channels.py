"""Channels as atoms: which indices of which parameters must leave together.

Every index of every parameter dimension is an *atom*, an integer. Going through the
operators in order of execution, each dimension of each tensor gets an array with the atom
of every position, or a text that says why its size is fixed. Operators tie, slice,
concatenate, repeat and permute these arrays (see :mod:`slimkit.graph.rules`). Atoms that
were tied, directly or over others, can only leave together. All work is on whole arrays
and linear in the number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from slimkit.graph.capturing import Call, Graph, Op, Ref
from slimkit.graph.groups import Role
from slimkit.graph.sizes import TrackedInt

__all__ = [
    "FREE",
    "RULES",
    "SPATIAL",
    "AtomArray",
    "ChannelTracker",
    "Dim",
    "ParameterDim",
    "Rule",
    "rule",
    "track",
]

AtomArray = npt.NDArray[np.int64]
Dim = AtomArray | str
"""The atoms along a dimension, or why its size is fixed ("it is part of the model's input")."""

SPATIAL = "it is a batch, spatial or sequence dimension"
FREE = "it is as large as what it meets"
"""A dimension of equal values that PyTorch itself expanded: it fixes and ties nothing."""


@dataclass
class ParameterDim:
    """One dimension of one parameter or buffer, with the atoms ``start … start + size``."""

    tensor: str
    dim: int
    start: int
    size: int
    role: Role | None = None


Rule = Callable[["ChannelTracker", Op], None]
RULES: dict[str, Rule] = {}
"""Operator name without overload and trailing underscore (``"aten.add"``) → what it does."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """A decorator that files a rule under the names of operators.

    A rule reads ``tracker.dims(value)`` of the inputs, calls ``tie``, ``freeze`` and
    ``mark``, and sets ``tracker.set_dims(value, dims)`` of every output.

    Args:
        operators: such as ``"aten.relu"`` (also used for ``aten.relu_``) or
            ``"torchvision.roi_align"``.

    Example:
        A custom operator that scales channels, registered as ``mylib::scale``::

            @rule("mylib.scale")
            def scale(tracker, op):
                x, factors = op.inputs
                dims = tracker.dims(x)
                tracker.tie(dims[1], tracker.dims(factors)[0])
                tracker.set_dims(op.outputs[0], dims)
    """

    def decorate(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return decorate


def rule_name(op: Op) -> str:
    """``"aten.relu_.default"`` → ``"aten.relu"``."""
    namespace, _, rest = op.name.partition(".")
    return f"{namespace}.{rest.split('.')[0].rstrip('_')}"


class ChannelTracker:
    """The state of one pass over a graph; what rules talk to.

    Args:
        graph: a captured graph.
        adjustable: paths of the norm layers whose shape is an attribute that can follow.

    Attributes:
        failed: operators whose rule could not read their arguments; treated as unknown.
    """

    def __init__(self, graph: Graph, adjustable: frozenset[str] = frozenset()) -> None:
        self.graph = graph
        self.adjustable = adjustable
        self.count = 0
        self.parameter_dims: dict[tuple[int, int], ParameterDim] = {}
        self.reasons: list[str] = []
        self.failed: list[Op] = []
        self._dims: dict[int, list[Dim]] = {}
        self._edges: list[tuple[AtomArray, AtomArray]] = []
        self._frozen: list[tuple[AtomArray, int]] = []
        self._claims: list[tuple[int, TrackedInt, AtomArray, str]] = []
        self._owners: list[ParameterDim] = []
        self._starts: list[int] = []

    # --- what rules read ---------------------------------------------------------------

    def shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.graph.tensors[value].shape

    def dims(self, value: int) -> list[Dim]:
        """The atoms of every dimension of a value; a copy of the list."""
        known = self._dims.get(value)
        if known is not None:
            return list(known)
        info = self.graph.tensors[value]
        if info.name is None:
            reason = (
                "it is part of the model's input"
                if value in self.graph.inputs
                else "it meets a tensor of fixed size"
            )
            return [reason] * len(info.shape)
        return [
            self.parameter_dim(value, dim) if size > 1 else "a parameter has size 1 there"
            for dim, size in enumerate(info.shape)
        ]

    def parameter_dim(self, value: int, dim: int, role: Role | None = None) -> Dim:
        """The atoms of one dimension of a weight, made on first use.

        Args:
            value: a parameter, or something computed from one.
            dim: the dimension.
            role: what the dimension does for its channels; see :meth:`mark`.
        """
        info = self.graph.tensors[value]
        if info.name is None:
            known = self.dims(value)[dim]
            self.mark(known, role)
            return known
        held = self.parameter_dims.get((value, dim))
        if held is None:
            held = ParameterDim(info.name, dim, self.count, info.shape[dim])
            self.parameter_dims[(value, dim)] = held
            self._owners.append(held)
            self._starts.append(held.start)
            self.count += held.size
        held.role = role or held.role
        return np.arange(held.start, held.start + held.size)

    def fresh(self, size: int, reason: str) -> AtomArray:
        """New atoms that no parameter owns, frozen for ``reason``."""
        atoms = np.arange(self.count, self.count + size)
        nobody = ParameterDim("", 0, self.count, size)
        self._owners.append(nobody)
        self._starts.append(nobody.start)
        self.count += size
        self.freeze(atoms, reason)
        return atoms

    def arguments(self, op: Op) -> dict[str, Any]:
        """The operator's arguments by name, defaults filled in."""
        bound: dict[str, Any] = {}
        for position, argument in enumerate(op.target._schema.arguments):
            if position < len(op.args):
                bound[argument.name] = op.args[position]
            else:
                bound[argument.name] = op.kwargs.get(argument.name, argument.default_value)
        return bound

    def call(self, op: Op) -> Call | None:
        """The Python-level call that issued an operator."""
        return self.graph.calls[op.call] if op.call >= 0 else None

    # --- what rules say ----------------------------------------------------------------

    def set_dims(self, value: int, dims: Sequence[Dim]) -> None:
        """Set the atoms of a result."""
        shape = self.shape(value)
        if len(dims) != len(shape):
            raise ValueError(f"{len(dims)} dimensions given for a tensor of shape {shape}")
        self._dims[value] = list(dims)

    def tie(self, first: Dim, second: Dim) -> None:
        """The positions of two dimensions of equal size leave together, one by one."""
        if isinstance(first, str):
            if first != FREE and not isinstance(second, str):
                self.freeze(second, first)
        elif isinstance(second, str):
            if second != FREE:
                self.freeze(first, second)
        elif first is not second and not np.array_equal(first, second):
            self._edges.append((first, second))

    def tie_columns(self, atoms: AtomArray) -> None:
        """For an array ``(rows, positions)``: position ``k`` of all rows leaves together."""
        if len(atoms) > 1:
            first = np.broadcast_to(atoms[:1], atoms[1:].shape)
            self._edges.append((first.ravel(), atoms[1:].ravel()))

    def freeze(self, dim: Dim, reason: str) -> None:
        """None of these atoms can leave."""
        if not isinstance(dim, str) and dim.size:
            if not self.reasons or self.reasons[-1] != reason:
                self.reasons.append(reason)
            self._frozen.append((np.unique(dim), len(self.reasons) - 1))

    def freeze_value(self, value: int, reason: str) -> None:
        """No dimension of this tensor can shrink."""
        info = self.graph.tensors[value]
        if info.name is None and value not in self._dims:
            return
        for dim in self.dims(value):
            self.freeze(dim, reason)

    def mark(self, dim: Dim, role: Role | None) -> None:
        """Say what the parameters behind these atoms do for their channels."""
        if isinstance(dim, str) or role is None:
            return
        for owner in np.unique(np.searchsorted(self._starts, dim, side="right") - 1):
            # Atoms of an activation are those of its producer, which stays one when it is read.
            if role != "consumer" or self._owners[owner].role != "producer":
                self._owners[owner].role = role

    def claim(self, op: Op, size: object, dim: Dim, what: str) -> None:
        """A result has the dimension ``dim``, and the model's code gave its size as ``size``.

        Fine if it is −1, or was read from a tensor that loses the same share of every set
        of atoms (checked when all ties are known); else frozen.
        """
        if isinstance(dim, str):
            return  # if ``size`` was read from a tracked dimension, that is found at the end
        if isinstance(size, TrackedInt):
            self._claims.append((op.call, size, dim, what))
        elif size != -1:
            self.freeze(dim, f"its size {size} is written as a number in {what}")

    def follows(self, size: object) -> bool:
        """Whether a size in the model's code is −1 or was read from a dimension of channels."""
        if isinstance(size, TrackedInt):
            return any(True for _ in self.origin_dims(size))
        return size == -1

    def origin_dims(self, size: TrackedInt) -> Iterator[AtomArray]:
        """The tracked dimensions that a number was read from."""
        for value, dim in size.origins:
            atoms: Dim = ""
            if value in self._dims:
                atoms = self._dims[value][dim]
            elif self._tracked(value) and self.shape(value)[dim] > 1:
                atoms = self.parameter_dim(value, dim)
            if not isinstance(atoms, str):
                yield atoms

    def _tracked(self, value: int) -> bool:
        return value in self._dims or self.graph.tensors[value].name is not None

    # --- the pass ----------------------------------------------------------------------

    def run(self) -> None:
        """Apply the rules to every operator, then freeze what must not change."""
        for op in self.graph.ops:
            apply = RULES.get(rule_name(op), RULES[""])
            try:
                apply(self, op)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                # An unusual call must not stop a user: what it touches stays as it is.
                self.failed.append(op)
                RULES["opaque"](self, op)
        for value in self.graph.outputs:
            self.freeze_value(value, "it is part of the model's output")
        for value, dim in self.graph.escaped:
            if self._tracked(value):
                self.freeze(self.dims(value)[dim], "its size enters a computation in Python")

    def components(self) -> tuple[AtomArray, dict[int, str]]:
        """The sets of atoms that leave together.

        Returns:
            labels: for every atom the smallest atom of its set.
            frozen: label → reason, for the sets that cannot leave.
        """
        claimed = {(call, id(size)) for call, size, _, _ in self._claims}
        for call in self.graph.calls:
            for size in _tracked_ints((call.args, call.kwargs)):
                if (call.index, id(size)) not in claimed:
                    for atoms in self.origin_dims(size):
                        self.freeze(atoms, f"its size shapes another tensor, in {where(call)}")
        # The sizes of a tensor may be read though no rule met its dimensions: they get atoms now.
        all_origins = [list(self.origin_dims(size)) for _, size, _, _ in self._claims]
        labels = _connected(self.count, self._edges)
        for (_, _, atoms, what), origins in zip(self._claims, all_origins, strict=True):
            if len(origins) != 1 or not _shrink_alike(labels[origins[0]], labels[atoms]):
                for dim in (*origins, atoms):
                    self.freeze(dim, f"its size is computed from another size in {what}")
        frozen: dict[int, str] = {}
        for atoms, reason in self._frozen:
            for label in np.unique(labels[atoms]).tolist():
                frozen.setdefault(label, self.reasons[reason])
        return labels, frozen


def _shrink_alike(first: AtomArray, second: AtomArray) -> bool:
    """Whether two dimensions always keep the same share: each label has an equal share."""
    labels, counts = np.unique(first, return_counts=True)
    others, other_counts = np.unique(second, return_counts=True)
    return np.array_equal(labels, others) and np.array_equal(
        counts * len(second), other_counts * len(first)
    )


def where(source: Op | Call) -> str:
    """A place for people: ``"view of layer1.0"``."""
    name = source.function if isinstance(source, Call) else rule_name(source)
    return f"{name} of {source.module}" if source.module else f"{name} of the model itself"


def track(graph: Graph, model: nn.Module) -> ChannelTracker:
    """Run all rules over the graph of a model."""
    from slimkit.graph import rules, rules_join, rules_norm, rules_view  # noqa: F401 - they fill RULES

    adjustable = frozenset(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm) and module.weight is not None
    )
    tracker = ChannelTracker(graph, adjustable)
    tracker.run()
    return tracker


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


def _connected(count: int, edges: list[tuple[AtomArray, AtomArray]]) -> AtomArray:
    """Smallest member of each connected component, by hooking and pointer jumping."""
    parent = np.arange(count)
    if not edges:
        return parent
    left = np.concatenate([first for first, _ in edges])
    right = np.concatenate([second for _, second in edges])
    while left.size:
        low, high = np.minimum(parent[left], parent[right]), np.maximum(parent[left], parent[right])
        open_ = low != high
        left, right, low, high = left[open_], right[open_], low[open_], high[open_]
        np.minimum.at(parent, high, low)
        while True:
            grand = parent[parent]
            if np.array_equal(grand, parent):
                break
            parent = grand
    return parent


def refs(argument: Any) -> list[int]:
    """The value numbers in an argument."""
    if isinstance(argument, Ref):
        return [argument.id]
    if isinstance(argument, tuple | list):
        return [value for item in argument for value in refs(item)]
    return []
