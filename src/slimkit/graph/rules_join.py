"""What operators do to channels: joining, splitting, slicing, padding and shuffling."""

from __future__ import annotations

import numpy as np

from slimkit.graph.capturing import Op, Ref
from slimkit.graph.channels import SPATIAL, AtomArray, ChannelTracker, Dim, rule, where
from slimkit.graph.rules import same
from slimkit.graph.sizes import TrackedInt

__all__: list[str] = []


# --- joining and splitting ---------------------------------------------------------------


@rule("aten.cat", "aten.concat")
def cat(tracker: ChannelTracker, op: Op) -> None:
    """Arrays of atoms are concatenated too."""
    a = tracker.arguments(op)
    values = [ref.id for ref in a["tensors"] if tracker.shape(ref.id) != (0,)]
    operands = [tracker.dims(value) for value in values]
    if not operands:
        same(tracker, op)
        return
    rank = len(operands[0])
    axis = a["dim"] % rank
    result: list[Dim] = []
    for i in range(rank):
        parts = [dims[i] for dims in operands]
        if i == axis:
            result.append(_joined(tracker, parts, [tracker.shape(v)[i] for v in values]))
            continue
        best = next((dim for dim in parts if not isinstance(dim, str)), parts[0])
        for dim in parts:
            tracker.tie(best, dim)
        result.append(best)
    tracker.set_dims(op.outputs[0], result)


def _joined(tracker: ChannelTracker, parts: list[Dim], sizes: list[int]) -> Dim:
    if all(isinstance(part, str) for part in parts):
        return parts[0]
    return np.concatenate(
        [
            tracker.fresh(size, part) if isinstance(part, str) else part
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


@rule("aten.stack")
def stack(tracker: ChannelTracker, op: Op) -> None:
    """Tensors of the same shape side by side in a new dimension."""
    a = tracker.arguments(op)
    operands = [tracker.dims(ref.id) for ref in a["tensors"]]
    dims = []
    for parts in zip(*operands, strict=True):
        best = next((dim for dim in parts if not isinstance(dim, str)), parts[0])
        for dim in parts:
            tracker.tie(best, dim)
        dims.append(best)
    place = a["dim"] % (len(dims) + 1)
    tracker.set_dims(op.outputs[0], [*dims[:place], SPATIAL, *dims[place:]])


@rule(
    *(
        "aten.split",
        "aten.split_with_sizes",
        "aten.chunk",
        "aten.unsafe_split",
        "aten.unsafe_chunk",
    ),
    *("aten.tensor_split", "aten.unsafe_split_with_sizes"),
)
def split(tracker: ChannelTracker, op: Op) -> None:
    """Equal parts (``chunk``) stay equal: position ``k`` of all leaves together."""
    dims = tracker.dims(op.inputs[0])
    axis = (tracker.arguments(op).get("dim") or 0) % len(dims)
    sizes = [tracker.shape(value)[axis] for value in op.outputs]
    atoms = dims[axis]
    parts: list[Dim] = [atoms] * len(sizes)
    if not isinstance(atoms, str):
        parts = list(np.split(atoms, np.cumsum(sizes)[:-1]))
        if not _follow(tracker, op, parts):
            tracker.freeze(
                atoms, f"the sizes of the parts are fixed in {where(tracker.call(op) or op)}"
            )
    for value, part in zip(op.outputs, parts, strict=True):
        tracker.set_dims(value, [*dims[:axis], part, *dims[axis + 1 :]])


def _follow(tracker: ChannelTracker, op: Op, parts: list[Dim]) -> bool:
    """Whether the parts shrink with the tensor: a chunk, or sizes that can change."""
    call = tracker.call(op)
    if call is None:
        return False
    what, equal = where(call), len({len(part) for part in parts}) == 1
    given = call.args[1] if len(call.args) > 1 else None
    if call.function in ("chunk", "unsafe_chunk", "tensor_split"):
        if not equal or isinstance(given, TrackedInt | tuple | list):
            return False
        tracker.link(parts, what)
        return True
    sizes = call.kwargs.get("split_size_or_sections", call.kwargs.get("split_size", given))
    listed = list(sizes) if isinstance(sizes, tuple | list) else [sizes] * len(parts)
    if len(listed) != len(parts) or not all(tracker.follows(size) in (1, 2) for size in listed):
        return False
    if not isinstance(sizes, tuple | list):
        if not equal:
            return False
        tracker.link(parts, what)
    for part, size in zip(parts, listed, strict=True):
        tracker.claim(op, size, part, what)
    return True


@rule("aten.glu")
def gated(tracker: ChannelTracker, op: Op) -> None:
    """One half is multiplied by the sigmoid of the other."""
    dims = tracker.dims(op.inputs[0])
    axis = tracker.arguments(op)["dim"] % len(dims)
    atoms = dims[axis]
    if not isinstance(atoms, str):
        halves = atoms.reshape(2, -1)
        tracker.tie_columns(halves)
        dims[axis] = halves[0]
    tracker.set_dims(op.outputs[0], dims)


@rule("aten.unbind", "aten.select")
def select(tracker: ChannelTracker, op: Op) -> None:
    """One position, or each, of a dimension."""
    dims = tracker.dims(op.inputs[0])
    axis = tracker.arguments(op)["dim"] % len(dims)
    tracker.freeze(dims[axis], f"single ones are picked in {where(op)}")
    for value in op.outputs:
        tracker.set_dims(value, [*dims[:axis], *dims[axis + 1 :]])


@rule("aten.slice")
def slice_(tracker: ChannelTracker, op: Op) -> None:
    """A range: channels stay free if all are taken, or sizes that were read split them evenly."""
    a = tracker.arguments(op)
    dims, shape = tracker.dims(op.inputs[0]), tracker.shape(op.inputs[0])
    axis = (a["dim"] or 0) % len(dims)
    size = shape[axis]
    start, end, step = slice(a["start"], a["end"], a["step"]).indices(size)
    atoms = dims[axis]
    if not isinstance(atoms, str) and (start, end, step) != (0, size, 1):
        if not _halves(tracker, op, axis, atoms, start, end, step):
            tracker.freeze(atoms, f"a fixed range is cut out in {where(tracker.call(op) or op)}")
        dims[axis] = atoms[start:end:step]
    tracker.set_dims(op.outputs[0], dims)


def _halves(
    tracker: ChannelTracker, op: Op, axis: int, atoms: AtomArray, start: int, end: int, step: int
) -> bool:
    """``x[:, : c // 2]`` or ``x[:, c // 2 :]``: equal parts, as in a chunk."""
    call = tracker.call(op)
    size = end - start
    if call is None or step != 1 or not size or len(atoms) % size or start % size:
        return False
    written = call.args[1] if len(call.args) > 1 else None
    indices = written if isinstance(written, tuple) else (written,)
    if len(indices) <= axis or not all(isinstance(index, slice) for index in indices[: axis + 1]):
        return False
    chosen = indices[axis]
    bounds = [bound for bound in (chosen.start, chosen.stop) if bound is not None and bound != 0]
    if not bounds or not all(isinstance(bound, TrackedInt) for bound in bounds):
        return False
    for bound in bounds:
        tracker.claim(op, bound, atoms, where(call))
    tracker.link(list(atoms.reshape(-1, size)), where(call))
    return True


@rule("aten.constant_pad_nd")
def pad(tracker: ChannelTracker, op: Op) -> None:
    """Constants around the tensor; around channels they are places that cannot leave."""
    padding = list(tracker.arguments(op)["pad"])
    dims = tracker.dims(op.inputs[0])
    for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        axis = len(dims) - 1 - i
        atoms = dims[axis]
        if isinstance(atoms, str) or (before == 0 and after == 0):
            continue
        reason = f"constants are put there in {where(op)}"
        if min(before, after) < 0:
            tracker.freeze(atoms, f"a fixed number is cut off in {where(op)}")
            atoms = atoms[max(-before, 0) : len(atoms) - max(-after, 0)]
        dims[axis] = np.concatenate(
            [tracker.fresh(max(before, 0), reason), atoms, tracker.fresh(max(after, 0), reason)]
        )
    tracker.set_dims(op.outputs[0], dims)


# --- shuffles ----------------------------------------------------------------------------


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(tracker: ChannelTracker, op: Op) -> None:
    """``(groups, k)`` becomes ``(k, groups)``."""
    a = tracker.arguments(op)
    dims = tracker.dims(op.inputs[0])
    if not isinstance(dims[1], str):
        grouped = dims[1].reshape(a["groups"], -1)
        tracker.tie_columns(grouped)
        dims[1] = grouped.T.ravel()
    tracker.set_dims(op.outputs[0], dims)


@rule("aten.pixel_shuffle")
def pixel_shuffle(tracker: ChannelTracker, op: Op) -> None:
    """Channels in runs of r² become one channel of r × r pixels."""
    factor = int(tracker.arguments(op)["upscale_factor"])
    dims = tracker.dims(op.inputs[0])
    if not isinstance(dims[-3], str):
        runs = dims[-3].reshape(-1, factor * factor)
        tracker.tie_columns(runs.T)
        dims[-3] = runs[:, 0]
    tracker.set_dims(op.outputs[0], [*dims[:-2], SPATIAL, SPATIAL])


@rule("aten.pixel_unshuffle", "aten.im2col")
def spread(tracker: ChannelTracker, op: Op) -> None:
    """Pixels of one channel become a run of channels."""
    dims = tracker.dims(op.inputs[0])
    shape, before = tracker.shape(op.outputs[0]), tracker.shape(op.inputs[0])
    axis = len(dims) - 3
    if not isinstance(dims[axis], str):
        dims[axis] = np.repeat(dims[axis], shape[axis] // before[axis])
    rest = [SPATIAL] * (len(shape) - axis - 1)
    tracker.set_dims(op.outputs[0], [*dims[: axis + 1], *rest])


@rule("aten.index")
def index(tracker: ChannelTracker, op: Op) -> None:
    """Positions chosen by tensors: the dimensions that are not indexed stay as they are."""
    a = tracker.arguments(op)
    dims = tracker.dims(op.inputs[0])
    indices = list(a["indices"])
    chosen = [i for i, item in enumerate(indices) if isinstance(item, Ref)]
    simple = len(chosen) >= 1 and chosen == list(range(chosen[0], chosen[-1] + 1))
    for i in chosen if simple else range(len(dims)):
        tracker.freeze(dims[i], f"they are picked by index in {where(op)}")
    shape = tracker.shape(op.outputs[0])
    if not simple:
        tracker.set_dims(op.outputs[0], [SPATIAL] * len(shape))
        return
    kept = len(dims) - len(chosen)
    middle: list[Dim] = [SPATIAL] * (len(shape) - kept)
    tracker.set_dims(op.outputs[0], [*dims[: chosen[0]], *middle, *dims[chosen[-1] + 1 :]])


@rule("aten.index_put")
def index_put(tracker: ChannelTracker, op: Op) -> None:
    """Rows of a tensor are overwritten: the dimensions behind them are those of the new rows."""
    a = tracker.arguments(op)
    x, rows, chosen = a["self"].id, a["values"].id, list(a["indices"])
    dims, new = tracker.dims(x), tracker.dims(rows)
    first = len(chosen)
    if any(item is None for item in chosen):
        raise ValueError("indices that leave out a dimension")
    for dim in dims[:first]:
        tracker.freeze(dim, f"they are picked by index in {where(op)}")
    for back in range(1, min(len(dims) - first, len(new)) + 1):
        if tracker.shape(x)[-back] == tracker.shape(rows)[-back]:
            tracker.tie(dims[-back], new[-back])
            dims[-back] = new[-back] if isinstance(dims[-back], str) else dims[-back]
        else:
            tracker.freeze(dims[-back], f"it is overwritten as a whole in {where(op)}")
    tracker.set_dims(op.outputs[0], dims)


@rule("aten.index_select")
def index_select(tracker: ChannelTracker, op: Op) -> None:
    """Like :func:`index` for one dimension."""
    dims = tracker.dims(op.inputs[0])
    axis = tracker.arguments(op)["dim"] % len(dims)
    tracker.freeze(dims[axis], f"they are picked by index in {where(op)}")
    dims[axis] = SPATIAL
    tracker.set_dims(op.outputs[0], dims)


@rule("aten.gather")
def gather(tracker: ChannelTracker, op: Op) -> None:
    """Positions chosen along one dimension, for each position of the others."""
    a = tracker.arguments(op)
    x, chosen = a["input"] if "input" in a else a["self"], a["index"]
    dims, picks = tracker.dims(x.id), tracker.dims(chosen.id)
    axis = a["dim"] % len(dims)
    tracker.freeze(dims[axis], f"they are picked by index in {where(op)}")
    result: list[Dim] = []
    for i, (dim, pick) in enumerate(zip(dims, picks, strict=True)):
        if i != axis and tracker.shape(x.id)[i] == tracker.shape(chosen.id)[i]:
            tracker.tie(dim, pick)
            result.append(dim)
        else:
            tracker.freeze(dim, f"a fixed range is picked in {where(op)}")
            result.append(pick)
    tracker.set_dims(op.outputs[0], result)
