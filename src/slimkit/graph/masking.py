"""The original network, run without what the channels that leave contribute."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimkit.doors import door
from slimkit.errors import CaptureError, PlanError, nearest
from slimkit.graph.capturing import Graph, Op, tensors_in
from slimkit.graph.channels import ChannelTracker, Dim, rule_name
from slimkit.graph.components import components
from slimkit.graph.decisions import Addresses, Decisions, ops_by_address
from slimkit.graph.groups import ATTENTION
from slimkit.graph.isolation import own_inputs, undisturbed
from slimkit.graph.rules import MIXING, STATISTICS
from slimkit.graph.tracking import track
from slimkit.inputs import ExampleInputs

__all__ = ["PruningPlan", "masked_outputs"]

NORMS = {"aten.native_layer_norm", "aten.native_group_norm"}


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


@door
def masked_outputs(
    model: nn.Module,
    example_inputs: ExampleInputs,
    graph: Graph,
    plan: PruningPlan,
    decisions: Decisions | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """The original's outputs without what the doomed channels contribute.

    Args:
        model: the network before pruning.
        example_inputs: of the same shapes as at capture.
        graph: its capture.
        plan: what goes.
        decisions: gets what was decided on the way.

    Returns:
        What the model returned, and the paths of the modules whose statistics were masked.

    Raises:
        PlanError: the plan edits what is no channel, or splits channels that belong together.
        CaptureError: the forward does not take the captured path.
    """
    tracker, doomed = _tracked(graph, model, plan)
    addresses = Addresses(model, graph.table)
    mode = _MaskMode(tracker, doomed, addresses, decisions or Decisions(graph.table))
    inputs = own_inputs(model, example_inputs)
    with undisturbed(model, seed=0), torch.no_grad(), addresses, mode:
        result = inputs.run(model)
    return result, tuple(dict.fromkeys(mode.masked_norms))


def _tracked(
    graph: Graph, model: nn.Module, plan: PruningPlan
) -> tuple[ChannelTracker, np.ndarray[Any, np.dtype[np.bool_]]]:
    """The channels, with attention split as the plan splits it, and which of them go."""
    try:
        tracker = track(graph, model)
        return tracker, _doomed(tracker, plan)
    except PlanError:
        for attention in ATTENTION:
            tracker = track(graph, model, attention)
            with contextlib.suppress(PlanError):
                return tracker, _doomed(tracker, plan)
        raise


def _doomed(tracker: ChannelTracker, plan: PruningPlan) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For every atom whether it goes; checks that sets of atoms go as a whole."""
    found = components(tracker)
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
        self,
        tracker: ChannelTracker,
        doomed: np.ndarray[Any, np.dtype[np.bool_]],
        addresses: Addresses,
        decisions: Decisions,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = tracker
        self._doomed = doomed
        self._addresses = addresses
        self._decisions = decisions
        self._ops = ops_by_address(tracker.graph)
        self.masked_norms: list[str] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        key = self._addresses.next_operator()
        op = self._ops.get(key)
        if op is not None and op.name == str(func):
            result = self._masked_call(op, func, args, kwargs)
        else:
            self._check_unknown(func, args)
            result = func(*args, **kwargs)
        self._decisions.note(key, func, (args, kwargs), result)
        return result

    def _check_unknown(self, func: Any, args: tuple[Any, ...]) -> None:
        """Behind a decision another path may be taken, but not with weights that shrink."""
        if str(func).rpartition(".")[0] not in MIXING | NORMS:
            return
        names = {id(p): name for name, p in self._addresses.parameters.items()}
        for tensor in tensors_in(args):
            name = names.get(id(tensor))
            if name is not None and any(
                self._gone(self._tracker.graph.parameters[name], dim) is not None
                for dim in range(tensor.ndim)
            ):
                raise CaptureError(
                    f"{func} ran where capture saw another operator",
                    where=name,
                    hint="the model takes another path than it did at capture",
                )

    def _masked_call(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        name = rule_name(op)
        if name in MIXING or "scaled_dot_product" in name:
            if "scaled_dot_product" in name:
                kwargs = self._attention_scale(op, args, kwargs)
            values = iter(op.inputs)
            args = tuple(self._masked(arg, values) for arg in args)
        elif name == "aten.native_layer_norm":
            return self._layer_norm(op, func, args)
        elif name == "aten.native_group_norm":
            return self._group_norm(op, func, args)
        elif "batch_norm" in name:
            return self._batch_norm(op, func, args, kwargs)
        elif name in STATISTICS:
            return self._statistics(op, func, args, kwargs)
        return func(*args, **kwargs)

    def _attention_scale(self, op: Op, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The scale that the pruned network takes: one over the root of the channels left."""
        gone = self._gone(op.inputs[0], args[0].ndim - 1)
        if gone is None or self._tracker.arguments(op).get("scale") is not None:
            return kwargs
        self.masked_norms.append(op.module)
        return {**kwargs, "scale": float((~gone).sum()) ** -0.5}

    def _kept(self, op: Op, x: Tensor, dims: Sequence[int]) -> dict[int, Tensor]:
        """Of each dimension that loses channels the places that stay."""
        kept = {}
        for dim in dims:
            gone = self._gone(op.inputs[0], dim)
            if gone is not None:
                kept[dim] = torch.from_numpy(np.flatnonzero(~gone)).to(x.device)
        return kept

    def _statistics(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A mean, a maximum, a softmax … over the channels that stay."""
        x = args[0]
        given = self._tracker.arguments(op).get("dim")
        chosen = [given] if isinstance(given, int) else list(given or range(x.ndim))
        kept = self._kept(op, x, [dim % x.ndim for dim in chosen] if x.ndim else [])
        if not kept:
            return func(*args, **kwargs)
        self.masked_norms.append(op.module)
        small = x
        for dim, places in kept.items():
            small = small.index_select(dim, places)
        result = func(small, *args[1:], **kwargs)
        if isinstance(result, Tensor) and result.ndim == x.ndim and result.shape == small.shape:
            return _scattered(result, x, kept)
        return result

    def _batch_norm(self, op: Op, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """With the statistics of the batch: over the places that stay."""
        x = args[0]
        kept = self._kept(op, x, [dim for dim in range(x.ndim) if dim != 1])
        a = self._tracker.arguments(op)
        if not kept or not (a.get("training") or a.get("use_input_stats")):
            return func(*args, **kwargs)
        self.masked_norms.append(op.module)
        small = x
        for dim, places in kept.items():
            small = small.index_select(dim, places)
        result, *rest = func(small, *args[1:], **kwargs)
        return (_scattered(result, x, kept), *rest)

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
