"""From channels that stay to a plan: every slice, every attribute, every line to explain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from slimkit.graph.capturing import Graph
from slimkit.graph.groups import Group
from slimkit.measure.macs import operator_costs, owner_of
from slimkit.prune.attributes import new_attributes
from slimkit.prune.costing import Cost
from slimkit.prune.edits import AttributeEdit, Edit, PrunePlan
from slimkit.prune.explaining import LayerChange

__all__ = ["write_plan"]


def write_plan(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    channels: Mapping[str, Sequence[int]],
    reasons: Mapping[str, str],
    *,
    costs: tuple[Cost, Cost],
    settings: Mapping[str, Any],
) -> PrunePlan:
    """The plan in which each group keeps the given channels.

    Args:
        model: the unpruned network.
        graph: its capture, with what only training mode runs.
        groups: all of its groups.
        channels: group name → channels that stay; other groups stay whole.
        reasons: group name → why it stays whole.
        costs: before and after.
        settings: how the channels were chosen.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    removed = _removed_positions(groups, channels)
    edits = tuple(
        Edit(name, dim, _left(tensors[name].shape[dim], gone))
        for (name, dim), gone in sorted(removed.items())
    )
    attributes = _attributes(model, edits, _counted(groups, channels))
    return PrunePlan(
        model=type(model).__name__,
        shapes={edit.tensor: tuple(tensors[edit.tensor].shape) for edit in edits},
        edits=edits,
        attributes=attributes,
        layers=tuple(_layers(model, graph, groups, reasons, edits, attributes)),
        before=costs[0],
        after=costs[1],
        settings=settings,
        network={
            name: tuple(tensor.shape)
            for name, tensor in model.named_parameters(remove_duplicate=False)
        },
    )


def _removed_positions(
    groups: Sequence[Group], channels: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], list[NDArray[np.int64]]]:
    """(tensor name, dimension) → positions that go."""
    removed: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
    for group in groups:
        if len(channels.get(group.name, range(group.size))) == group.size:
            continue
        gone = np.setdiff1d(np.arange(group.size), channels[group.name])
        for slot in group.slots:
            removed.setdefault((slot.tensor, slot.dim), []).append(slot.positions[gone].ravel())
    return removed


def _left(size: int, removed: Sequence[NDArray[np.int64]]) -> tuple[int, ...]:
    """The positions of a dimension that stay."""
    stays = np.ones(size, dtype=bool)
    stays[np.concatenate(removed)] = False
    return tuple(np.flatnonzero(stays).tolist())


def _counted(
    groups: Sequence[Group], channels: Mapping[str, Sequence[int]]
) -> dict[tuple[str, str], tuple[int, int]]:
    """(module path, attribute) → before and after, of numbers that count channels."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    gone: dict[str, int] = {}
    whole: dict[str, int] = {}
    for group in groups:
        kept = len(channels.get(group.name, range(group.size)))
        for slot in group.sizes:
            gone[slot.tensor] = gone.get(slot.tensor, 0) + (group.size - kept) * slot.width
            whole[slot.tensor] = whole.get(slot.tensor, 0) + slot.positions.size
        if kept < group.size:
            for path, name, value in group.attributes:
                found[path, name] = value, value * kept // group.size
    for tensor, count in gone.items():
        if count:
            path, _, name = tensor.partition(":")
            found[path, name] = whole[tensor], whole[tensor] - count
    return found


def _attributes(
    model: nn.Module, edits: Sequence[Edit], counted: Mapping[tuple[str, str], tuple[int, int]]
) -> tuple[AttributeEdit, ...]:
    """Attributes of every module that holds an edited tensor, and those that count channels."""
    names: dict[int, list[str]] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        names.setdefault(id(tensor), []).append(name)
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
    }
    kept: dict[str, dict[tuple[str, int], Sequence[int]]] = {}
    for edit in edits:
        for name in names[id(tensors[edit.tensor])]:
            path, local = owner_of(name)
            kept.setdefault(path, {})[local, edit.dim] = edit.keep
    changes: dict[tuple[str, str], tuple[Any, Any]] = {**counted}
    for path, stays in kept.items():
        for name, change in new_attributes(model.get_submodule(path), stays).items():
            changes[path, name] = change
    return tuple(AttributeEdit(*place, *change) for place, change in changes.items())


def _layers(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    reasons: Mapping[str, str],
    edits: Sequence[Edit],
    attributes: Sequence[AttributeEdit],
) -> Iterator[LayerChange]:
    """One row per weight that multiplies, in the order of the modules."""
    modules = dict(model.named_modules())
    ran = {cost.weight for cost in operator_costs(graph)}
    left = {(edit.tensor, edit.dim): len(edit.keep) for edit in edits}
    sizes = {(edit.module, edit.attribute): edit.after for edit in attributes}
    owners: dict[tuple[str, int], list[str]] = {}
    sets: dict[tuple[str, int], tuple[int, int]] = {}
    for group in groups:
        for slot in group.slots:
            owners.setdefault((slot.tensor, slot.dim), []).append(group.name)
            if slot.width > 1:
                sets[slot.tensor, slot.dim] = group.size, slot.width
    linked = {group.name: group.link for group in groups if group.link not in (None, group.name)}
    for name, weight in model.named_parameters():
        path, local = owner_of(name)
        module = modules[path]
        if name not in ran and not (_is_layer(module) and name == f"{path}.weight"):
            continue
        out_dim = 1 if isinstance(module, _ConvNd) and module.transposed else 0
        in_dim = 1 - out_dim if weight.dim() > 1 else 0
        channels, inputs = weight.shape[out_dim], weight.shape[in_dim]
        kept, inputs_kept = left.get((name, out_dim), channels), left.get((name, in_dim), inputs)
        if isinstance(module, _ConvNd):  # a grouped weight does not show all of them
            channels, inputs = module.out_channels, module.in_channels
            kept = sizes.get((path, "out_channels"), channels)
            inputs_kept = sizes.get((path, "in_channels"), inputs)
        names = tuple(dict.fromkeys(owners.get((name, out_dim), [])))
        yield LayerChange(
            name=path if local == "weight" else name,
            type=type(module).__name__,
            channels=channels,
            kept=kept,
            inputs=inputs,
            inputs_kept=inputs_kept,
            groups=names,
            reason=_why(names, reasons, ran=name in ran) if kept == channels else None,
            sets=sets.get((name, out_dim)) if len(names) == 1 else None,
            linked=next((linked[n] for n in names if n in linked), None),
        )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


def _why(names: Sequence[str], reasons: Mapping[str, str], *, ran: bool) -> str:
    """Why a layer keeps all of its channels."""
    if not ran:
        return "it did not run on the example inputs"
    found = [reasons[name] for name in names if name in reasons]
    if found:
        return found[0]
    return "its outputs are not channels that could go"
