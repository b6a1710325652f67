"""What operators do to channels: views, permutations, repetition and new tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slimkit.graph.capturing import Call, Op, Ref
from slimkit.graph.channels import (
    FREE,
    SPATIAL,
    AtomArray,
    ChannelTracker,
    Dim,
    SplitChoice,
    rule,
    where,
)
from slimkit.graph.sizes import TrackedInt

__all__: list[str] = []

FOLLOWS = -1
"""Stands for a size that PyTorch itself computes from the tensor, such as a −1 in a view."""


# --- views -------------------------------------------------------------------------------


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias")
def view(tracker: ChannelTracker, op: Op) -> None:
    """Dimensions merge and split; each part of the shape that can is treated on its own."""
    source, target = tracker.shape(op.inputs[0]), tracker.shape(op.outputs[0])
    dims = tracker.dims(op.inputs[0])
    sizes = _written_sizes(tracker, op, len(target))
    if 0 in source or not source or not target:
        tracker.freeze_value(op.inputs[0], f"{where(op)} has no elements or dimensions")
        tracker.set_dims(op.outputs[0], [SPATIAL] * len(target))
        return
    result: list[Dim] = [SPATIAL] * len(target)
    for ins, outs in _blocks(source, target):
        block = [dims[i] for i in ins]
        shape = [target[j] for j in outs]
        done = _reshape(
            tracker, op, block, [source[i] for i in ins], shape, [sizes[j] for j in outs]
        )
        for j, dim in zip(outs, done, strict=True):
            result[j] = dim
    tracker.set_dims(op.outputs[0], result)


def _written_sizes(tracker: ChannelTracker, op: Op, rank: int) -> Sequence[object]:
    """The sizes as the model's code gave them; ``FOLLOWS`` where PyTorch computes them."""
    call = tracker.call(op)
    follows: Sequence[object] = [FOLLOWS] * rank
    if call is None:
        return list(tracker.shape(op.outputs[0]))  # a compiled part: take them for numbers
    sized = ("view", "reshape", "unflatten", "view_as", "reshape_as", "expand", "broadcast_to")
    if call.function not in sized:
        return follows
    if call.function in ("view_as", "reshape_as"):
        other = call.args[1].id
        shape = tracker.shape(other)
        return [TrackedInt(s, (((other, d), 1),), []) for d, s in enumerate(shape)]
    if call.function == "unflatten":
        return _unflattened(tracker, call, rank)
    given = [*call.args[1:], *call.kwargs.values()]
    flat = list(given[0]) if given and isinstance(given[0], tuple | list) else given
    return flat if len(flat) == rank else follows


def _unflattened(tracker: ChannelTracker, call: Call, rank: int) -> Sequence[object]:
    dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
    given = call.kwargs.get("sizes", call.args[-1])
    before = dim % len(tracker.shape(call.inputs[0]))
    after = rank - before - len(given)
    return [*[FOLLOWS] * before, *given, *[FOLLOWS] * after]


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The finest pairs of runs of dimensions with equal products."""
    blocks = []
    i = j = 0
    while i < len(source) and j < len(target):
        ins, outs = [i], [j]
        left, right = source[i], target[j]
        while left != right:
            if left < right:
                ins.append(ins[-1] + 1)
                left *= source[ins[-1]]
            else:
                outs.append(outs[-1] + 1)
                right *= target[outs[-1]]
        blocks.append((ins, outs))
        i, j = ins[-1] + 1, outs[-1] + 1
    return blocks  # what is left over has size 1


def _reshape(
    tracker: ChannelTracker,
    op: Op,
    dims: list[Dim],
    source: list[int],
    target: list[int],
    sizes: list[object],
) -> list[Dim]:
    """One block: the dimensions of the result."""
    place = where(tracker.call(op) or op)
    tracked = [i for i, dim in enumerate(dims) if not isinstance(dim, str)]
    fixed: list[Dim] = [next((dim for dim in dims if isinstance(dim, str)), SPATIAL)] * len(target)
    if not tracked:
        return fixed
    if len(tracked) > 1:
        for i in tracked:
            tracker.freeze(dims[i], f"two kinds of channels are merged in {place}")
        return fixed
    atoms = np.asarray(dims[tracked[0]])
    shape = [1] * len(source)
    shape[tracked[0]] = len(atoms)
    places = np.arange(len(atoms)).reshape(shape)
    spread = np.broadcast_to(places, source).reshape(target)
    result = list(fixed)
    # Atoms that repeat (tokens × channels) may part again without new ties.
    parted = [j for j in range(len(target)) if _varies(atoms[spread], j)]
    varying = [j for j in range(len(target)) if _varies(spread, j)]
    if len(parted) == 1 and tracker.follows(sizes[parted[0]]):
        varying = parted
    chosen = _chosen(tracker, op, varying, sizes)
    if len(varying) > 1 and chosen is None:
        split_up = " × ".join(map(str, target))
        tracker.freeze(atoms, f"they are split into {split_up}, which does not follow, in {place}")
    elif varying:
        j = varying[0] if chosen is None else chosen
        rows = atoms[np.moveaxis(spread, j, -1).reshape(-1, target[j])]
        if len(varying) > 1:
            tracker.tie_columns(rows)
        result[j] = rows[0]
        if chosen is not None and op.index in tracker.choices:
            tracker.choices[op.index] = replace(tracker.choices[op.index], atoms=rows[0])
    for j, dim in enumerate(result):
        tracker.claim(op, sizes[j], dim, place)
    return result


def _chosen(tracker: ChannelTracker, op: Op, varying: list[int], sizes: list[object]) -> int | None:
    """The one of several dimensions that shrinks when channels leave."""
    able = [j for j in varying if tracker.follows(sizes[j])]
    kind = tracker.kind(op)
    wanted = [j for j in able if j not in tracker.avoided.get(kind, ())] or able
    if len(varying) < 2 or not wanted:
        return None
    if op.module in tracker.heads:
        best = min(wanted) if tracker.heads[op.module] else max(wanted)
    else:
        best = max(wanted, key=lambda j: (tracker.follows(sizes[j]), -j))
    others = tuple(j for j in wanted if j != best)
    tracker.choices[op.index] = SplitChoice(kind, best, others, np.zeros(0, dtype=np.int64))
    return best


def _varies(array: AtomArray, axis: int) -> bool:
    return array.shape[axis] > 1 and bool((array != array.take([0], axis)).any())


# --- permutations ------------------------------------------------------------------------


@rule("aten.permute", "aten.transpose", "aten.t", "aten.numpy_T", "aten.swapaxes")
def permute(tracker: ChannelTracker, op: Op) -> None:
    """Dimensions change places."""
    a = tracker.arguments(op)
    dims = tracker.dims(op.inputs[0])
    rank = len(dims)
    order = list(range(rank))
    if "dims" in a:
        order = [dim % rank for dim in a["dims"]]
    elif rank > 1:
        first, second = a.get("dim0", 0) % rank, a.get("dim1", 1) % rank
        order[first], order[second] = order[second], order[first]
    tracker.set_dims(op.outputs[0], [dims[i] for i in order])


@rule("aten.as_strided")
def as_strided(tracker: ChannelTracker, op: Op) -> None:
    """Another memory layout of the same shape, or something that cannot be followed."""
    x, result = op.inputs[0], op.outputs[0]
    if tracker.shape(x) == tracker.shape(result):
        tracker.set_dims(result, tracker.dims(x))
        return
    tracker.freeze_value(x, f"its memory is read directly in {where(op)}")
    tracker.set_dims(result, [f"it comes out of {where(op)}"] * len(tracker.shape(result)))


@rule("aten.unsqueeze")
def unsqueeze(tracker: ChannelTracker, op: Op) -> None:
    """A new dimension of size 1."""
    dims = tracker.dims(op.inputs[0])
    place = tracker.arguments(op)["dim"] % (len(dims) + 1)
    tracker.set_dims(op.outputs[0], [*dims[:place], SPATIAL, *dims[place:]])


@rule("aten.squeeze")
def squeeze(tracker: ChannelTracker, op: Op) -> None:
    """Dimensions of size 1 go."""
    dims, shape = tracker.dims(op.inputs[0]), tracker.shape(op.inputs[0])
    given = tracker.arguments(op).get("dim")
    chosen = range(len(dims)) if given is None else [given] if isinstance(given, int) else given
    gone = {dim % len(dims) for dim in chosen if shape[dim] == 1} if dims else set()
    for i in gone:
        tracker.freeze(dims[i], f"it is alone where {where(op)} drops a dimension")
    tracker.set_dims(op.outputs[0], [dim for i, dim in enumerate(dims) if i not in gone])


@rule("aten.expand")
def expand(tracker: ChannelTracker, op: Op) -> None:
    """Dimensions of size 1 are repeated, new ones appear in front."""
    shape = tracker.shape(op.outputs[0])
    dims, source = tracker.dims(op.inputs[0]), tracker.shape(op.inputs[0])
    new = len(shape) - len(dims)
    call = tracker.call(op)
    explicit = call is not None and call.function in ("expand", "broadcast_to")
    written = _written_sizes(tracker, op, len(shape)) if explicit else [FOLLOWS] * len(shape)
    result: list[Dim] = [FREE] * len(shape)
    for i, size in enumerate(written):
        dim = dims[i - new] if i >= new else None
        if dim is not None and source[i - new] == shape[i]:
            result[i] = dim
            if shape[i] > 1:
                tracker.claim(op, size, dim, where(op))
        elif explicit:
            result[i] = _sized(tracker, op, size, shape[i], "it is expanded to a fixed size")
    if call is not None and call.function == "expand_as":
        other = tracker.dims(call.args[1].id)
        result = [theirs if own == FREE else own for own, theirs in zip(result, other, strict=True)]
    tracker.set_dims(op.outputs[0], result)


def _sized(tracker: ChannelTracker, op: Op, size: object, length: int, fixed: str) -> Dim:
    """A new dimension of equal values: it follows if its size was read from a tensor."""
    if isinstance(size, TrackedInt):
        origins = list(tracker.origin_dims(size))
        if len(origins) == 1 and len(origins[0]) == length:
            tracker.claim(op, size, origins[0], where(tracker.call(op) or op))
            return origins[0]
    return fixed


@rule(
    *("aten.empty", "aten.zeros", "aten.ones", "aten.full", "aten.rand", "aten.randn"),
    *("aten.new_empty", "aten.new_zeros", "aten.new_ones", "aten.new_full"),
)
def create(tracker: ChannelTracker, op: Op) -> None:
    """A new tensor, the same at all positions: sizes read from another tensor follow it."""
    call = tracker.call(op)
    for output in op.outputs:
        shape = tracker.shape(output)
        sizes = _created_sizes(call) if call is not None else []
        if len(sizes) != len(shape):
            sizes = shape
        fixed = "it meets a tensor made with a fixed size"
        result = [_sized(tracker, op, size, n, fixed) for size, n in zip(sizes, shape, strict=True)]
        tracker.set_dims(output, result)


def _created_sizes(call: Call) -> Sequence[object]:
    """The sizes in a call such as ``torch.zeros(b, c)`` or ``x.new_zeros((b, c))``."""
    given = [a for a in call.args if not isinstance(a, Ref)] or list(call.kwargs.values())[:1]
    return list(given[0]) if given and isinstance(given[0], tuple | list) else given


@rule("aten.repeat")
def repeat(tracker: ChannelTracker, op: Op) -> None:
    """The tensor is laid side by side with itself."""
    times = tracker.arguments(op)["repeats"]
    dims = tracker.dims(op.inputs[0])
    padded: list[Dim] = [*[SPATIAL] * (len(times) - len(dims)), *dims]
    result = [
        np.tile(dim, n) if not isinstance(dim, str) and len(dim) > 1 else dim
        for dim, n in zip(padded, times, strict=True)
    ]
    shape = tracker.shape(op.outputs[0])
    tracker.set_dims(
        op.outputs[0],
        [
            d if isinstance(d, str) or len(d) == s else SPATIAL
            for d, s in zip(result, shape, strict=True)
        ],
    )
