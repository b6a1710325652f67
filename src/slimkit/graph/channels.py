"""Channels as atoms: which indices of which parameters must leave together.

Every index of every parameter dimension is an *atom*, an integer. Going through the
operators in order of execution, each dimension of each tensor gets an array with the atom
of every position, or a text that says why its size is fixed. Operators tie, slice,
concatenate, repeat and permute these arrays (see :mod:`slimkit.graph.rules`). Atoms that
were tied, directly or over others, can only leave together. All work is on whole arrays
and linear in the number of positions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slimkit.graph.capturing import Call, Graph, Op, Ref
from slimkit.graph.disjoint import DisjointSets
from slimkit.graph.groups import SlotRole
from slimkit.graph.sizes import Powers, TrackedInt

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
    role: SlotRole | None = None


SplitKind = tuple[str, str, int]


@dataclass(frozen=True)
class SplitChoice:
    """Channels were split into several dimensions of which any one could shrink.

    Attributes:
        kind: class of the module, function and ordinal: choices of one kind are made alike.
        axis: the dimension of the result that was chosen.
        others: the dimensions that could have been.
        atoms: the atoms along the chosen one.
    """

    kind: SplitKind
    axis: int
    others: tuple[int, ...]
    atoms: AtomArray


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
        adjustable: paths of the layers whose groups or shape are attributes that follow.
        kernels: names of convolution weights, whose last dimensions are no channels.
        classes: module path → class name.
        avoided: kind of split → axes that should not shrink there; see :class:`SplitChoice`.
        heads: module path of an attention → whether its heads should shrink rather than the
            channels of each head.
        protected: value number → why its channels stay.

    Attributes:
        failed: operators whose rule could not read their arguments; treated as unknown.
        sets: which atoms leave together.
        frozen: atoms that cannot leave, and the number of the reason.
        claims: (call, size, atoms or None, place): dimensions with a size from the code.
        links: dimensions that stay equally large.
        choices: operator index → which axis of a split was let shrink, of which.
        shares: atoms whose values a softmax made shares of one.
    """

    def __init__(
        self,
        graph: Graph,
        adjustable: frozenset[str] = frozenset(),
        kernels: frozenset[str] = frozenset(),
        classes: Mapping[str, str] | None = None,
        avoided: Mapping[SplitKind, frozenset[int]] | None = None,
        heads: Mapping[str, bool] | None = None,
        protected: Mapping[int, str] | None = None,
    ) -> None:
        self.graph = graph
        self.protected = protected or {}
        self.kernels = kernels
        self.classes = classes or {}
        self.avoided = avoided or {}
        self.heads = heads or {}
        self.adjustable = adjustable
        self.sets = DisjointSets()
        self.parameter_dims: dict[tuple[int, int], ParameterDim] = {}
        self.reasons: list[str] = []
        self.failed: list[Op] = []
        self._dims: dict[int, list[Dim]] = {}
        self.frozen: list[tuple[AtomArray, int]] = []
        self.claims: list[tuple[int, TrackedInt, AtomArray | None, str]] = []
        self.links: list[tuple[list[AtomArray], str]] = []
        self.choices: dict[int, SplitChoice] = {}
        self.shares: set[int] = set()
        self._owners: list[ParameterDim] = []
        self._starts: list[int] = []

    @property
    def count(self) -> int:
        """How many atoms there are."""
        return self.sets.size

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
        channels = 2 if info.name in self.kernels else len(info.shape)
        return [
            self.parameter_dim(value, dim)
            if size > 1 and dim < channels
            else ("a parameter has size 1 there" if size == 1 else SPATIAL)
            for dim, size in enumerate(info.shape)
        ]

    def parameter_dim(self, value: int, dim: int, role: SlotRole | None = None) -> Dim:
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
            self.parameter_dims[value, dim] = held
            self._hold(held)
        held.role = role or held.role
        return np.arange(held.start, held.start + held.size)

    def _hold(self, held: ParameterDim) -> None:
        self._owners.append(held)
        self._starts.append(held.start)
        self.sets.grow(held.size)

    def fresh(self, size: int, reason: str) -> AtomArray:
        """New atoms that no parameter owns, frozen for ``reason``."""
        atoms = np.arange(self.count, self.count + size)
        self._hold(ParameterDim("", 0, self.count, size))
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

    def kind(self, op: Op) -> SplitKind:
        """What choices are made alike: see :class:`SplitChoice`."""
        call = self.call(op)
        place = (op.name, op.index) if call is None else (call.function, call.ordinal)
        return (self.classes.get(op.module, ""), *place)

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
            self.sets.join(first, second)

    def contract(self, first: Dim, second: Dim) -> None:
        """An operator multiplies along two dimensions and adds up: they leave together.

        The bins of a distribution stay where weights or constants read them: the code around
        the network knows what they stand for, as in the box heads of Generalized Focal Loss
        (Li et al. 2020), which turn shares into a distance.
        """
        self.tie(first, second)
        if isinstance(first, str) or isinstance(second, str) or not self.shares:
            return
        for dim, weights in ((first, second), (second, first)):
            if not self.shares.isdisjoint(dim.tolist()) and not self._produced(weights):
                self.freeze(dim, "they are the bins of a distribution (softmax)")

    def _produced(self, atoms: AtomArray) -> bool:
        """Whether these are channels that some layer makes, not a layer's weights."""
        return any(self._owners[owner].role == "producer" for owner in self._owners_of(atoms))

    def tie_columns(self, atoms: AtomArray) -> None:
        """For an array ``(rows, positions)``: position ``k`` of all rows leaves together."""
        if len(atoms) > 1:
            first = np.broadcast_to(atoms[:1], atoms[1:].shape)
            self.sets.join(first.ravel(), atoms[1:].ravel())

    def freeze(self, dim: Dim, reason: str) -> None:
        """None of these atoms can leave."""
        if not isinstance(dim, str) and dim.size:
            if not self.reasons or self.reasons[-1] != reason:
                self.reasons.append(reason)
            self.frozen.append((dim, len(self.reasons) - 1))

    def freeze_value(self, value: int, reason: str) -> None:
        """No dimension of this tensor can shrink."""
        info = self.graph.tensors[value]
        if info.name is None and value not in self._dims:
            return
        for dim in self.dims(value):
            self.freeze(dim, reason)

    def mark(self, dim: Dim, role: SlotRole | None) -> None:
        """Say what the parameters behind these atoms do for their channels."""
        if isinstance(dim, str) or role is None or not dim.size:
            return
        for owner in self._owners_of(dim):
            # Atoms of an activation are those of its producer, which stays one when it is read.
            if role != "consumer" or self._owners[owner].role != "producer":
                self._owners[owner].role = role

    def _owners_of(self, atoms: AtomArray) -> list[int]:
        first, last = (bisect_right(self._starts, end) - 1 for end in (atoms.min(), atoms.max()))
        if first == last:
            return [first]
        starts = np.asarray(self._starts[first : last + 1])
        inside = np.searchsorted(starts, atoms, side="right") - 1 + first
        return np.flatnonzero(np.bincount(inside)).tolist()

    def claim(self, op: Op, size: object, dim: Dim, what: str) -> None:
        """A result has the dimension ``dim``, and the model's code gave its size as ``size``.

        Fine if it is −1. If it was read from tensors or attributes, they and the dimension
        must shrink alike, which is looked into when all ties are known. Else frozen.
        """
        if isinstance(size, TrackedInt):
            if not isinstance(dim, str):
                self._measure(size, dim)
            self.claims.append((op.call, size, None if isinstance(dim, str) else dim, what))
        elif size != -1 and not isinstance(dim, str):
            self.freeze(dim, f"its size {size} is written as a number in {what}")

    def _measure(self, size: TrackedInt, dim: AtomArray) -> None:
        """If the size is an attribute, the attribute gets a place in the channels' set."""
        if len(size.powers) != 1:
            return
        ((origin, power),) = size.powers
        if origin[0] >= 0 or power != 1 or origin in self.parameter_dims:
            return
        path, name, value = self.graph.attributes[-1 - origin[0]]
        _, first = np.unique(dim, return_index=True)
        distinct = dim if len(dim) == value else dim[np.sort(first)]
        if len(distinct) == value:
            held = ParameterDim(f"{path}:{name}", 0, self.count, value, "size")
            self.parameter_dims[origin] = held
            self._hold(held)
            self.sets.join(distinct, np.arange(held.start, held.start + value))

    def link(self, dims: Sequence[Dim], what: str) -> None:
        """Dimensions of equal size stay equally large, though each loses its own channels."""
        atoms = [dim for dim in dims if not isinstance(dim, str)]
        if len(atoms) < len(dims):
            for dim in atoms:
                self.freeze(dim, f"its size must be that of another part in {what}")
        elif len(atoms) > 1:
            self.links.append((atoms, what))

    def follows(self, size: object) -> int:
        """How well a size in the model's code follows when channels leave.

        Returns:
            0 for a number; 1 if it was read from attributes of modules; 2 if also from a
            tensor's dimension of channels; 3 for −1, which PyTorch computes.
        """
        if not isinstance(size, TrackedInt):
            return 3 if size == -1 else 0
        origins = [origin for origin, _ in size.powers]
        if any(value >= 0 and self._origin_dim(value, dim) is not None for value, dim in origins):
            return 2
        return 1 if any(value < 0 for value, _ in origins) else 0

    def origin_dims(self, size: TrackedInt) -> Iterator[AtomArray]:
        """The tracked dimensions that a number was read from."""
        for (value, dim), _ in size.powers:
            atoms = self._origin_dim(value, dim)
            if atoms is not None:
                yield atoms

    def _origin_dim(self, value: int, dim: int) -> AtomArray | None:
        if value < 0:
            held = self.parameter_dims.get((value, dim))
            return None if held is None else np.arange(held.start, held.start + held.size)
        atoms: Dim = ""
        if value in self._dims:
            atoms = self._dims[value][dim]
        elif self._tracked(value) and self.shape(value)[dim] > 1:
            atoms = self.parameter_dim(value, dim)
        return None if isinstance(atoms, str) else atoms

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
        for value, reason in self.protected.items():
            self.freeze_value(value, reason)

    def powers(self, size: Powers) -> list[tuple[AtomArray, int]]:
        """The atoms behind each factor of a size, with its exponent.

        The attribute number ``k`` stands as ``[-1 - k]`` where no dimension is as large;
        factors that are no channels are left out.
        """
        found: list[tuple[AtomArray, int]] = []
        for (value, dim), power in size:
            atoms = self._origin_dim(value, dim)
            if atoms is None and value < 0:
                atoms = np.asarray([value])
            if atoms is not None and len(atoms):
                found.append((atoms, power))
        return found


def where(source: Op | Call) -> str:
    """A place for people: ``"view of layer1.0"``."""
    name = source.function if isinstance(source, Call) else rule_name(source)
    return f"{name} of {source.module}" if source.module else f"{name} of the model itself"


def refs(argument: Any) -> list[int]:
    """The value numbers in an argument."""
    if isinstance(argument, Ref):
        return [argument.id]
    if isinstance(argument, tuple | list):
        return [value for item in argument for value in refs(item)]
    return []
