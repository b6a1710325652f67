"""What operators do to channels: element-wise ones, convolutions and matrix products.

See :func:`slimkit.graph.channels.rule` for how to add one. The others are in
:mod:`~slimkit.graph.rules_norm`, :mod:`~slimkit.graph.rules_view` and
:mod:`~slimkit.graph.rules_join`.
"""

from __future__ import annotations

import numpy as np
import torch

from slimkit.graph.capturing import Op
from slimkit.graph.channels import FREE, SPATIAL, ChannelTracker, Dim, rule, where
from slimkit.graph.sizes import TrackedInt

__all__ = ["MIXING", "STATISTICS", "broadcast", "in_blocks", "pointwise", "same", "spatial_dims"]

MIXING: set[str] = {
    "aten.addmm",
    "aten.baddbmm",
    "aten.bmm",
    "aten.convolution",
    "aten.dot",
    "aten.linear",
    "aten.mkldnn_rnn_layer",
    "aten.linalg_vector_norm",
    "aten.mm",
    "aten.mv",
    "aten.norm",
    "aten.sum",
    "torchvision.deform_conv2d",
}
"""Operators that add up over channels: a channel that is zero in front of them is gone."""


STATISTICS: set[str] = {
    *(f"aten.{name}" for name in ("mean", "amax", "amin", "max", "min", "prod", "logsumexp")),
    *(f"aten.{name}" for name in ("var", "std", "var_mean", "std_mean", "all", "any")),
    *("aten._softmax", "aten._log_softmax", "aten._safe_softmax"),
}
"""Operators that treat a dimension as a whole: the pruned network takes the channels that stay."""


def in_blocks(groups: int, in_per_group: int, out_per_group: int) -> bool:
    """Whether a grouped convolution loses whole groups, as depthwise ones do.

    Else it loses the same positions of every group. The rule takes what leaves more choice.
    """
    return groups > max(in_per_group, out_per_group)


@rule("")
def unknown(tracker: ChannelTracker, op: Op) -> None:
    """Operators without a rule: element-wise ones are known by their tag, the rest freezes."""
    if torch.Tag.pointwise in op.target.tags:
        pointwise(tracker, op)
    else:
        _opaque(tracker, op, f"nothing is known about the operator {where(op)}")


@rule("opaque")
def opaque(tracker: ChannelTracker, op: Op) -> None:
    """An operator with a rule that could not read its arguments."""
    _opaque(tracker, op, f"this use of the operator {where(op)} cannot be followed")


def _opaque(tracker: ChannelTracker, op: Op, reason: str) -> None:
    """Whatever goes in must stay as it is, and what comes out has a fixed size."""
    for value in op.inputs:
        tracker.freeze_value(value, reason)
    for value in op.outputs:
        tracker.set_dims(value, [f"it comes out of {where(op)}"] * len(tracker.shape(value)))


def broadcast(tracker: ChannelTracker, values: list[int], shape: tuple[int, ...]) -> list[Dim]:
    """Tie the dimensions of ``values`` as broadcasting to ``shape`` lines them up."""
    operands = [tracker.dims(value) for value in values]
    result: list[Dim] = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        met = [
            dims[-back]
            for value, dims in zip(values, operands, strict=True)
            if len(dims) >= back and tracker.shape(value)[-back] == size
        ]
        atoms = [dim for dim in met if not isinstance(dim, str)]
        for dim in met:
            if atoms and dim is not atoms[0]:
                tracker.tie(atoms[0], dim)
        fixed = [dim for dim in met if isinstance(dim, str) and dim != FREE]
        result.append((*fixed, *atoms, *met, SPATIAL)[0])
    return result


@rule(
    *("aten.copy", "aten.hardswish", "aten.hardsigmoid", "aten._prelu_kernel", "aten.clamp"),
    *("aten.rrelu_with_noise", "aten.native_dropout", "aten.masked_fill", "aten.where"),
)
def pointwise(tracker: ChannelTracker, op: Op) -> None:
    """Each position of the result depends on that position of the operands."""
    for output in op.outputs:
        shape = tracker.shape(output)
        values = [value for value in op.inputs if len(tracker.shape(value)) <= len(shape)]
        tracker.set_dims(output, broadcast(tracker, values, shape))


@rule(
    *("aten.alias", "aten.clone", "aten.contiguous", "aten.detach", "aten.lift_fresh"),
    *("aten._to_copy", "aten.to", "aten.zeros_like", "aten.ones_like", "aten.empty_like"),
    *("aten.full_like", "aten.rand_like", "aten.randn_like", "aten.fill", "aten.zero"),
    *("aten.bernoulli", "aten.uniform", "aten.normal", "aten.dropout"),
)
def same(tracker: ChannelTracker, op: Op) -> None:
    """The result has the dimensions of the first operand."""
    for output in op.outputs:
        tracker.set_dims(output, tracker.dims(op.inputs[0]))


def spatial_dims(tracker: ChannelTracker, op: Op, dims: list[Dim]) -> None:
    """Channels that lie along a spatial dimension cannot leave."""
    for dim in dims:
        tracker.freeze(dim, f"they lie along a spatial dimension of {where(op)}")


# --- convolutions and matrix products ----------------------------------------------------


@rule("aten.convolution", "aten._convolution", "aten.cudnn_convolution")
def convolution(tracker: ChannelTracker, op: Op) -> None:
    """Plain, grouped, depthwise and transposed convolutions of any dimension."""
    a = tracker.arguments(op)
    x, weight, groups = a["input"].id, a["weight"].id, int(a["groups"])
    bias = a["bias"].id if a.get("bias") is not None else None
    if tracker.graph.tensors[weight].name is None:  # computed, from what is a kernel, too
        for taps in tracker.dims(weight)[2:]:
            tracker.freeze(taps, f"they are taps of the kernel of {where(op)}")
    transposed = bool(a.get("transposed", False))
    rank = len(tracker.shape(weight)) - 2
    dims = tracker.dims(x)
    channel = len(dims) - rank - 1
    out = _convolve(tracker, dims[channel], weight, groups, transposed=transposed)
    call = tracker.call(op)
    if call is not None and tracker.shape(weight)[1] == 1 and op.module not in tracker.adjustable:
        # depthwise by hand: ``groups=x.shape[1]``
        given = call.kwargs.get("groups", call.args[6] if len(call.args) > 6 else -1)
        if isinstance(given, TrackedInt):
            tracker.claim(op, given, dims[channel], where(op))
    if bias is not None:
        tracker.tie(out, tracker.parameter_dim(bias, 0, "vector"))
    spatial_dims(tracker, op, dims[channel + 1 :])
    tracker.set_dims(op.outputs[0], [*dims[:channel], out, *[SPATIAL] * rank])


def _convolve(
    tracker: ChannelTracker, x: Dim, weight: int, groups: int, *, transposed: bool
) -> Dim:
    """Tie input channels and weight; returns the output channels."""
    if transposed:
        return _convolve_transposed(tracker, x, weight, groups)
    out_channels, in_per_group = tracker.shape(weight)[:2]
    out_per_group = out_channels // groups
    out = tracker.parameter_dim(weight, 0, "producer")
    if groups == 1:
        tracker.contract(x, tracker.parameter_dim(weight, 1, "consumer"))
        return out
    if in_blocks(groups, in_per_group, out_per_group):
        _tie_blocks(tracker, x, out, groups)
        return out
    inner = tracker.parameter_dim(weight, 1, "consumer")
    tracker.tie(inner if isinstance(inner, str) else np.tile(inner, groups), x)
    if not isinstance(out, str):
        tracker.tie_columns(out.reshape(groups, out_per_group))
    return out


def _convolve_transposed(tracker: ChannelTracker, x: Dim, weight: int, groups: int) -> Dim:
    """The weight is ``(C_in, C_out / groups, …)``."""
    in_channels, out_per_group = tracker.shape(weight)[:2]
    inside = tracker.parameter_dim(weight, 0, "consumer")
    tracker.tie(inside, x)
    if groups > 1 and in_blocks(groups, in_channels // groups, out_per_group):
        tracker.mark(inside, "producer")  # of dimension 0 nothing else is left to make channels
        if isinstance(inside, str):
            return inside
        blocks = inside.reshape(groups, -1)
        tracker.tie_columns(blocks.T)
        return np.repeat(blocks[:, 0], out_per_group)
    outside = tracker.parameter_dim(weight, 1, "producer")
    if groups == 1:
        return outside
    if not isinstance(inside, str):
        tracker.tie_columns(inside.reshape(groups, -1))
    return outside if isinstance(outside, str) else np.tile(outside, groups)


def _tie_blocks(tracker: ChannelTracker, x: Dim, out: Dim, groups: int) -> None:
    """Group ``i`` of the input and group ``i`` of the output leave together, as a whole."""
    if isinstance(x, str) or isinstance(out, str):
        tracker.tie(x, out)
        return
    both = np.concatenate([out.reshape(groups, -1), x.reshape(groups, -1)], axis=1)
    tracker.tie_columns(both.T)


def contract(
    tracker: ChannelTracker, first: Dim, second: Dim, *, out: tuple[Dim, ...] = ()
) -> None:
    """A matrix product adds up over a dimension of both; ``out`` are the second's others."""
    tracker.contract(first, second)
    tracker.mark(second, "consumer")
    for dim in out:
        tracker.mark(dim, "producer")


@rule("aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matrix_product(tracker: ChannelTracker, op: Op) -> None:
    """``(…, n, k) @ (…, k, m)``, or with one or two vectors."""
    first, second = (tracker.dims(value) for value in op.inputs[:2])
    call = tracker.call(op)
    attends = call is not None and call.function == "scaled_dot_product_attention"
    if call is not None and attends and call.kwargs.get("scale") is None:
        # Taken apart by PyTorch: the scale, from the number of channels, is a plain number.
        tracker.freeze(first[-1], f"the scale depends on their number in {where(call)}")
    _product(tracker, op, first, second)


def _product(tracker: ChannelTracker, op: Op, first: list[Dim], second: list[Dim]) -> list[Dim]:
    inner = len(second) - 2 if len(second) > 1 else 0
    contract(tracker, first[-1], second[inner], out=tuple(second[inner + 1 :]))
    tracker.mark(first[-1], "consumer")
    batch: list[Dim] = []
    for left, right in zip(first[:-2], second[:-2], strict=False):
        tracker.tie(left, right)
        batch.append(right if isinstance(left, str) else left)
    rows = [first[-2]] if len(first) > 1 else []
    result = [*batch, *rows, *second[inner + 1 :]]
    tracker.set_dims(op.outputs[0], result)
    return result


@rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def product_and_bias(tracker: ChannelTracker, op: Op) -> None:
    """``bias + first @ second``."""
    bias, first, second = op.inputs[:3]
    result = _product(tracker, op, tracker.dims(first), tracker.dims(second))
    for dim, other in zip(reversed(result), reversed(tracker.dims(bias)), strict=False):
        if not isinstance(dim, str) or not isinstance(other, str):
            tracker.tie(dim, other)


@rule("aten.linear")
def linear(tracker: ChannelTracker, op: Op) -> None:
    """Back-ends that keep ``F.linear`` whole; elsewhere it is a matrix product."""
    x, weight = op.inputs[:2]
    dims = tracker.dims(x)
    tracker.contract(dims[-1], tracker.parameter_dim(weight, 1, "consumer"))
    out = tracker.parameter_dim(weight, 0, "producer")
    if len(op.inputs) > 2:
        tracker.tie(out, tracker.parameter_dim(op.inputs[2], 0, "vector"))
    tracker.set_dims(op.outputs[0], [*dims[:-1], out])


@rule("aten.mkldnn_rnn_layer")
def recurrent(tracker: ChannelTracker, op: Op) -> None:
    """One direction of a recurrent layer: input channels can go, its own state stays."""
    x, to_gates, *rest = op.inputs
    tracker.tie(tracker.parameter_dim(to_gates, 1, "consumer"), tracker.dims(x)[-1])
    reason = f"they hold the state of {where(op)}"
    tracker.freeze(tracker.parameter_dim(to_gates, 0), reason)
    for value in rest:
        tracker.freeze_value(value, reason)
    for value in op.outputs:
        tracker.set_dims(value, [reason] * len(tracker.shape(value)))


@rule("aten.embedding")
def embedding(tracker: ChannelTracker, op: Op) -> None:
    """The table's rows are chosen by numbers; its columns are channels."""
    weight, indices = op.inputs
    tracker.freeze(tracker.parameter_dim(weight, 0), "its rows are chosen by index")
    columns = tracker.parameter_dim(weight, 1, "producer")
    tracker.set_dims(op.outputs[0], [*[SPATIAL] * len(tracker.shape(indices)), columns])


@rule("torchvision.deform_conv2d")
def deformable_convolution(tracker: ChannelTracker, op: Op) -> None:
    """A convolution whose sampling points are an input."""
    a = tracker.arguments(op)
    groups = int(a["groups"])
    for extra in (a["offset"], a["mask"]):
        tracker.freeze_value(extra.id, "it says where a deformable convolution samples")
    dims = tracker.dims(a["input"].id)
    if groups > 1 or int(a["offset_groups"]) > 1:
        tracker.freeze(dims[1], f"its channels share offsets in {where(op)}")
    out = _convolve(tracker, dims[1], a["weight"].id, groups, transposed=False)
    tracker.tie(out, tracker.parameter_dim(a["bias"].id, 0, "vector"))
    tracker.set_dims(op.outputs[0], [dims[0], out, SPATIAL, SPATIAL])


def _mask(tracker: ChannelTracker, op: Op, query: list[Dim], mask: int) -> None:
    """A mask or bias per head leaves with its head; else it stays."""
    dims, shape = tracker.dims(mask), tracker.shape(mask)
    heads = tracker.shape(op.inputs[0])[1]
    for back, dim in enumerate(reversed(dims), start=1):
        if back == 3 and shape[-3] == heads > 1:
            tracker.tie(query[1], dim)
        else:
            tracker.freeze(dim, f"it is the mask of {where(op)}")


@rule(
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_attention_math",
)
def attention(tracker: ChannelTracker, op: Op) -> None:
    """``(N, heads, tokens, channels)``: heads go together; the value's channels are free."""
    query, key, value = (tracker.dims(v) for v in op.inputs[:3])
    for other in (key, value):
        tracker.tie(query[1], other[1])
    tracker.tie(query[-1], key[-1])
    for mask in op.inputs[3:]:
        _mask(tracker, op, query, mask)
    heads = next((d[1] for d in (query, key, value) if not isinstance(d[1], str)), query[1])
    tracker.set_dims(op.outputs[0], [query[0], heads, query[2], value[-1]])
    for rest in op.outputs[1:]:
        tracker.set_dims(rest, [SPATIAL] * len(tracker.shape(rest)))
