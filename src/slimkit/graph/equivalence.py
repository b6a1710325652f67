"""Proof of a pruning plan: the pruned network and the masked original must agree.

The original runs with its doomed channels set to zero in front of every operator that adds
up over channels (convolutions, matrix products, sums, norms), and with the statistics of
layer and group norms over the channels that stay. Whatever the weights are, that is what
the pruned network computes, so outputs agree to rounding or the plan is wrong. No
training, no data, any network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimkit.errors import CaptureError, PlanError, nearest
from slimkit.graph.capturing import Graph, Op, capture, own_inputs, tensors_in, undisturbed
from slimkit.graph.channels import ChannelTracker, Dim, rule_name, track
from slimkit.graph.components import components
from slimkit.graph.rules import MIXING
from slimkit.inputs import ExampleInputs, as_inputs

__all__ = ["Equivalence", "check_equivalence", "masked_outputs"]


class _Edit(Protocol):
    @property
    def tensor(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def keep(self) -> Sequence[int]: ...


class PruningPlan(Protocol):
    """What is needed of a plan."""

    @property
    def edits(self) -> Sequence[_Edit]:
        """What stays of which dimension of which tensor."""

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Prune in place."""


@dataclass(frozen=True)
class Equivalence:
    """What :func:`check_equivalence` found.

    Attributes:
        max_abs_diff: largest difference of any output element.
        max_abs_output: largest output element, to judge the difference by.
        tolerance: the difference allowed, as a fraction of ``max_abs_output``.
        masked_norms: paths of the norms whose statistics leave out channels that go, so
            that the pruned network is *not* the original with zeroed channels.
    """

    max_abs_diff: float
    max_abs_output: float
    tolerance: float
    masked_norms: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the outputs agree; false if they are not finite."""
        return self.max_abs_diff <= self.tolerance * self.max_abs_output

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "DIFFERENT"
        text = f"{verdict}: outputs up to {self.max_abs_output:.3g} differ by "
        text += f"{self.max_abs_diff:.3g} at most"
        if self.masked_norms:
            text += "; statistics over the channels that stay in " + ", ".join(self.masked_norms)
        return text


def check_equivalence(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: ExampleInputs,
    *,
    tolerance: float = 1e-8,
    double: bool = True,
) -> Equivalence:
    """Compare the masked original with the pruned network. ``model`` is not changed.

    Args:
        model: the network before pruning.
        plan: the plan, with ``edits`` and ``apply_to``.
        example_inputs: what both are run on.
        tolerance: allowed difference as a fraction of the largest output element.
        double: run copies in float64, where rounding cannot hide or feign a mistake. With
            ``False`` in the model's own precision; then allow about 1e-4.

    Raises:
        PlanError: the plan does not fit the model, or splits channels that belong together.
        CaptureError: a forward failed.
    """
    inputs = as_inputs(example_inputs)
    original = copy.deepcopy(model)
    if double:
        original = original.double()
        inputs = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    masked, norms = masked_outputs(original, inputs, capture(original, inputs), plan)
    pruned = plan.apply_to(original)
    with undisturbed(pruned), torch.no_grad():
        try:
            found = list(tensors_in(own_inputs(pruned, inputs).call(pruned)))
        except Exception as error:
            raise CaptureError(
                f"the pruned network fails with {type(error).__name__}: {error}",
                where=type(model).__name__,
            ) from error
    expected = list(tensors_in(masked))
    return Equivalence(
        max_abs_diff=max(_difference(*pair) for pair in zip(found, expected, strict=True)),
        max_abs_output=max((float(t.abs().max()) for t in expected if t.numel()), default=0.0),
        tolerance=tolerance,
        masked_norms=norms,
    )


def _difference(first: Tensor, second: Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    if not first.numel():
        return 0.0
    difference = float((first.double() - second.double()).abs().max())
    return difference if difference == difference else float("inf")  # noqa: PLR0124 - NaN


def masked_outputs(
    model: nn.Module, example_inputs: ExampleInputs, graph: Graph, plan: PruningPlan
) -> tuple[Any, tuple[str, ...]]:
    """The original's outputs without what the doomed channels contribute.

    Args:
        model: the network before pruning.
        example_inputs: of the same shapes as at capture.
        graph: its capture.
        plan: what goes.

    Returns:
        What the model returned, and the paths of the norms whose statistics were masked.

    Raises:
        PlanError: the plan edits what is no channel, or splits channels that belong together.
        CaptureError: the forward does not take the captured path.
    """
    tracker = track(graph, model)
    mode = _MaskMode(tracker, _doomed(tracker, plan))
    inputs = own_inputs(model, example_inputs)
    with undisturbed(model), torch.no_grad(), mode:
        result = inputs.call(model)
    return result, tuple(dict.fromkeys(mode.masked_norms))


def _doomed(tracker: ChannelTracker, plan: PruningPlan) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For every atom whether it goes; checks that sets of atoms go as a whole."""
    doomed = np.zeros(tracker.count, dtype=bool)
    held = {(dim.tensor, dim.dim): dim for dim in tracker.parameter_dims.values()}
    for edit in plan.edits:
        owner = held.get((edit.tensor, edit.dim))
        if owner is None:
            known = [name for name, _ in held]
            raise PlanError(
                f"dimension {edit.dim} holds no channels",
                where=edit.tensor,
                hint="" if edit.tensor in known else nearest(edit.tensor, known),
            )
        gone = np.ones(owner.size, dtype=bool)
        gone[list(edit.keep)] = False
        doomed[owner.start : owner.start + owner.size] = gone
    found = components(tracker)
    labels, frozen = found.labels, found.frozen
    goes = np.zeros(tracker.count, dtype=bool)
    goes[labels[doomed]] = True
    for owner in held.values():
        if owner.role == "size":
            continue
        part = slice(owner.start, owner.start + owner.size)
        if not np.array_equal(goes[labels[part]], doomed[part]):
            raise PlanError(
                f"the plan leaves channels in dimension {owner.dim} that others took with them",
                where=owner.tensor,
            )
        for label in labels[part][doomed[part]].tolist():
            if label in frozen:
                raise PlanError(f"a channel goes although {frozen[label]}", where=owner.tensor)
    return goes[labels]


class _MaskMode(TorchDispatchMode):
    """Runs the captured operators again, with masks in front of those that mix channels."""

    def __init__(
        self, tracker: ChannelTracker, doomed: np.ndarray[Any, np.dtype[np.bool_]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = tracker
        self._doomed = doomed
        self._ops = iter(tracker.graph.ops)
        self.masked_norms: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        op = next(self._ops, None)
        if op is None or op.name != str(func):
            raise CaptureError(
                f"ran {func} where capture saw {op.name if op else 'the end'}",
                hint="the model takes another path than it did at capture",
            )
        name = rule_name(op)
        if name in MIXING or "scaled_dot_product" in name:
            values = iter(op.inputs)
            args = tuple(self._masked(arg, values) for arg in args)
        elif name == "aten.native_layer_norm":
            return self._layer_norm(op, func, args)
        elif name == "aten.native_group_norm":
            return self._group_norm(op, func, args)
        return func(*args, **kwargs)

    def _gone(self, value: int, dim: int) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        """Which positions of a dimension go; ``None`` if none do."""
        tracker = self._tracker
        if tracker.graph.tensors[value].name is not None:
            held = tracker.parameter_dims.get((value, dim))
            atoms: Dim = "" if held is None else np.arange(held.start, held.start + held.size)
        else:
            atoms = tracker.dims(value)[dim]
        if isinstance(atoms, str) or not self._doomed[atoms].any():
            return None
        return self._doomed[atoms]

    def _masked(self, argument: Any, values: Any) -> Any:
        """``argument`` with zeros where channels go; takes as many values as it has tensors."""
        if isinstance(argument, tuple | list):
            return [self._masked(item, values) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        value = next(values)
        for dim in range(argument.ndim):
            gone = self._gone(value, dim)
            if gone is not None:
                places = torch.from_numpy(np.flatnonzero(gone)).to(argument.device)
                argument = argument.index_fill(dim, places, 0)
        return argument

    def _layer_norm(self, op: Op, func: Any, args: tuple[Any, ...]) -> Any:
        x, shape, weight, bias, eps = args
        value = op.inputs[0]
        first = x.ndim - len(shape)
        small, kept = x, {}
        for dim in range(first, x.ndim):
            gone = self._gone(value, dim)
            if gone is not None:
                kept[dim] = torch.from_numpy(np.flatnonzero(~gone)).to(x.device)
                small = small.index_select(dim, kept[dim])
                weight = weight if weight is None else weight.index_select(dim - first, kept[dim])
                bias = bias if bias is None else bias.index_select(dim - first, kept[dim])
        if not kept:
            return func(*args)
        self.masked_norms.append(op.module)
        result, *statistics = func(small, list(small.shape[first:]), weight, bias, eps)
        whole = func(*args)[0]  # in the memory layout that the operators behind saw at capture
        return (whole.copy_(_scattered(result, x, kept)), *statistics)

    def _group_norm(self, op: Op, func: Any, args: tuple[Any, ...]) -> Any:
        x, weight, bias, batch, channels, area, groups, eps = args
        gone = self._gone(op.inputs[0], 1)
        if gone is None:
            return func(*args)
        self.masked_norms.append(op.module)
        per_group = channels // groups
        kept = torch.from_numpy(np.flatnonzero(~gone)).to(x.device)
        left = len({int(place) // per_group for place in kept})
        small = x.index_select(1, kept)
        weight, bias = (t if t is None else t.index_select(0, kept) for t in (weight, bias))
        result, *statistics = func(small, weight, bias, batch, len(kept), area, left, eps)
        whole = func(*args)[0]
        return (whole.copy_(_scattered(result, x, {1: kept})), *statistics)


def _scattered(small: Tensor, like: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """``small`` back in the shape of ``like``, zeros elsewhere."""
    for dim, places in kept.items():
        shape = list(small.shape)
        shape[dim] = like.shape[dim]
        small = small.new_zeros(shape).index_copy_(dim, places, small)
    return small
