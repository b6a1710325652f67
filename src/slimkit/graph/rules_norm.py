"""What operators do to channels: norms, reductions, pooling and resizing."""

from __future__ import annotations

from typing import Any

from slimkit.graph.capturing import Op, Ref
from slimkit.graph.channels import SPATIAL, ChannelTracker, refs, rule, rule_name, where
from slimkit.graph.rules import MIXING, STATISTICS, pointwise, spatial_dims

__all__: list[str] = []


# --- normalisation, activation, reduction ------------------------------------------------


@rule(
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_no_training",
    "aten.cudnn_batch_norm",
    "aten.miopen_batch_norm",
    "aten.batch_norm",
)
def batch_norm(tracker: ChannelTracker, op: Op) -> None:
    """One scale, shift, mean and variance per channel."""
    dims = tracker.dims(op.inputs[0])
    for value in op.inputs[1:]:
        tracker.tie(dims[1], tracker.parameter_dim(value, 0, "vector"))
    tracker.set_dims(op.outputs[0], dims)
    for rest in op.outputs[1:]:
        shape = tracker.shape(rest)
        tracker.set_dims(
            rest, [dims[1]] if len(shape) == 1 and shape[0] else [SPATIAL] * len(shape)
        )


@rule("aten.native_layer_norm")
def layer_norm(tracker: ChannelTracker, op: Op) -> None:
    """Statistics over the last dimensions, which the module's settings name."""
    a = tracker.arguments(op)
    dims = tracker.dims(a["input"].id)
    count = len(a["normalized_shape"])
    given = _normalized_shape(tracker, op, count)
    tail = dims[len(dims) - count :]
    for position, dim in enumerate(tail):
        for argument in (a["weight"], a["bias"]):
            if isinstance(argument, Ref):
                tracker.tie(dim, tracker.parameter_dim(argument.id, position, "vector"))
        if given is not None:
            tracker.claim(op, given[position], dim, where(op))
    tracker.set_dims(op.outputs[0], dims)
    for rest in op.outputs[1:]:
        tracker.set_dims(rest, [*dims[: len(dims) - count], *[SPATIAL] * count])


def _normalized_shape(tracker: ChannelTracker, op: Op, count: int) -> tuple[object, ...] | None:
    """The shape as written by the caller; ``None`` if a module holds it as an attribute."""
    call = tracker.call(op)
    if call is None or op.module in tracker.adjustable:
        return None
    given = call.kwargs.get("normalized_shape", call.args[1] if len(call.args) > 1 else ())
    return tuple(given) if isinstance(given, tuple | list) and len(given) == count else None


@rule("aten.native_group_norm")
def group_norm(tracker: ChannelTracker, op: Op) -> None:
    """Every group keeps as many channels as the others: position ``k`` of all leaves at once.

    With one channel per group (instance norm) the channels are free and the number of
    groups follows.
    """
    a = tracker.arguments(op)
    dims, groups = tracker.dims(a["input"].id), int(a["group"])
    channels = dims[1]
    for argument in (a["weight"], a["bias"]):
        if isinstance(argument, Ref):
            tracker.tie(channels, tracker.parameter_dim(argument.id, 0, "vector"))
    if not isinstance(channels, str):
        if groups == len(channels) and op.module not in tracker.adjustable:
            tracker.freeze(channels, f"the number of groups is written in {where(op)}")
        elif 1 < groups < len(channels):
            tracker.tie_columns(channels.reshape(groups, -1))
    tracker.set_dims(op.outputs[0], dims)
    for rest in op.outputs[1:]:
        tracker.set_dims(rest, [dims[0], SPATIAL])


@rule("aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(tracker: ChannelTracker, op: Op) -> None:
    """Exponentials over their sum: over those that stay, when channels leave."""
    dims = tracker.dims(op.inputs[0])
    over = dims[tracker.arguments(op)["dim"]]
    if not isinstance(over, str):
        tracker.shares.update(over.tolist())
    tracker.set_dims(op.outputs[0], dims)


@rule("aten.cumsum", "aten.cumprod", "aten.sort", "aten.flip", "aten.topk")
def along_a_dimension(tracker: ChannelTracker, op: Op) -> None:
    """One dimension is treated as a whole, the others position by position."""
    a = tracker.arguments(op)
    given: Any = a.get("dim", a.get("dims"))
    dims = tracker.dims(op.inputs[0])
    for dim in given if isinstance(given, list | tuple) else [given]:
        tracker.freeze(dims[dim], f"all of them enter {where(op)}")
    for output in op.outputs:
        tracker.set_dims(output, dims)


@rule("aten.roll")
def roll(tracker: ChannelTracker, op: Op) -> None:
    """Positions move in a circle along some dimensions."""
    a = tracker.arguments(op)
    dims = tracker.dims(op.inputs[0])
    for dim in a["dims"] or range(len(dims)):
        tracker.freeze(dims[dim], f"their places are counted in {where(op)}")
    tracker.set_dims(op.outputs[0], dims)


@rule(
    *("aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.var_mean"),
    *("aten.std_mean", "aten.prod", "aten.argmax", "aten.argmin", "aten.all", "aten.any"),
    *("aten.max", "aten.min", "aten.logsumexp", "aten.linalg_vector_norm", "aten.norm"),
)
def reduce(tracker: ChannelTracker, op: Op) -> None:
    """Taken over the channels that stay; positions among channels (``argmax``) would change."""
    a = tracker.arguments(op)
    dims = tracker.dims(op.inputs[0])
    if len(refs([a.get("other")])):  # the element-wise maximum of two tensors
        pointwise(tracker, op)
        return
    given = a.get("dim")
    chosen = [given] if isinstance(given, int) else list(given or range(len(dims)))
    reduced = {dim % len(dims) for dim in chosen} if dims else set()
    name = rule_name(op)
    places = name in ("aten.argmax", "aten.argmin") or any(
        tracker.graph.consumers(value) or value in tracker.graph.outputs
        for value in (op.outputs[1:] if name in ("aten.max", "aten.min") else ())
    )
    if places or (name not in MIXING and name not in STATISTICS):
        for dim in reduced:
            tracker.freeze(dims[dim], f"all of them enter {where(op)}")
    for output in op.outputs:
        if len(tracker.shape(output)) == len(dims):
            result = [SPATIAL if i in reduced else dim for i, dim in enumerate(dims)]
        else:
            result = [dim for i, dim in enumerate(dims) if i not in reduced]
        tracker.set_dims(output, result)


# --- spatial operators -------------------------------------------------------------------


@rule(
    *(f"aten.{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("avg", "max", "adaptive_avg")),
    *(f"aten._adaptive_avg_pool{n}d" for n in (2, 3)),
    *(f"aten.{kind}_pool{n}d_with_indices" for n in (2, 3) for kind in ("max",)),
    *(f"aten.{kind}_pool{n}d" for n in (2, 3) for kind in ("adaptive_max", "fractional_max")),
    *("aten.mkldnn_max_pool2d", "aten.upsample_linear1d", "aten.upsample_nearest1d"),
    *(f"aten.upsample_{kind}2d" for kind in ("nearest", "bilinear", "bicubic")),
    *("aten._upsample_bilinear2d_aa", "aten._upsample_nearest_exact2d", "aten.upsample_nearest3d"),
    *("aten.upsample_trilinear3d", "aten._upsample_bicubic2d_aa", "aten.grid_sampler_2d"),
    *(f"aten.{kind}_pad{n}d" for n in (1, 2, 3) for kind in ("reflection", "replication")),
)
def spatial(tracker: ChannelTracker, op: Op) -> None:
    """Pooling, resizing and padding: channels stay as they are."""
    name = rule_name(op)
    rank = next((n for n in (1, 2, 3) if f"{n}d" in name), 2)
    dims = tracker.dims(op.inputs[0])
    kept = dims[: len(dims) - rank]
    spatial_dims(tracker, op, dims[len(dims) - rank :])
    for extra in op.inputs[1:]:
        tracker.freeze_value(extra, f"it says where {where(op)} samples")
    for output in op.outputs:
        tracker.set_dims(output, [*kept, *[SPATIAL] * rank])


@rule("torchvision.roi_align", "torchvision.roi_pool")
def regions(tracker: ChannelTracker, op: Op) -> None:
    """Crops of a feature map."""
    dims = tracker.dims(op.inputs[0])
    tracker.freeze_value(op.inputs[1], "it holds boxes")
    for output in op.outputs:
        tracker.set_dims(output, [SPATIAL, dims[1], SPATIAL, SPATIAL])
