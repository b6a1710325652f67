"""Biases of integer layers: whole numbers on the scale of the sums that they are added to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimkit.errors import ExportError
from slimkit.runtime.fake_quantize import fits_half, room_for_bias
from slimkit.runtime.onnx_graph import GraphEditor
from slimkit.runtime.qdq_compact import unpacked, zeros

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["write_biases"]

Array = np.ndarray[Any, Any]


def write_biases(graph: GraphEditor, *, short: bool) -> None:
    """Constant biases of Conv and Gemm between integer input and integer weight.

    As int32 their scale ``s_x · s_w`` is a product in the file, not a third number for every
    channel: runtimes compute it when they load the file. Of a 16-bit float ONNX Runtime makes the
    same int32 then, if the output is quantized.

    Args:
        graph: with its weights in place.
        short: write 16-bit floats where they suffice.
    """
    halves: dict[str, Array] = {}
    for node in list(graph.nodes):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        bias = graph.constant(node.input[2])
        pair = graph.quantization_of(node.input[0])
        weight = graph.producer(node.input[1])
        if bias is None or pair is None or weight is None or weight.op_type != "DequantizeLinear":
            continue
        scale_x, scale_w = graph.constant(pair[0]), graph.constant(weight.input[1])
        if scale_x is None or scale_w is None or scale_w.ndim > 1:
            continue
        wide = np.broadcast_to(scale_w, bias.shape)
        roomy = room_for_bias(*map(_tensor, (scale_w, bias, scale_x))).numpy()
        if (roomy > wide).any():
            if scale_w.ndim == 0 or graph.attribute(weight, "axis") not in (0, None):
                continue  # it stays in float, and so does this layer
            wide = roomy
            _requantize(graph, weight, scale_w, wide)
        half = short and _meets_quantizer(graph, node)
        if half and fits_half(_tensor(bias)):
            halves[node.input[2]] = bias.astype(np.float16)
            continue
        _place(graph, node, bias, pair[0], weight.input[1], wide * scale_x)
    unpacked(graph, halves)


def _place(
    graph: GraphEditor, node: NodeProto, bias: Array, scale_x: str, scale_w: str, scale: Array
) -> None:
    rounded = np.clip(np.rint(bias / scale.astype(np.float64)), -(2**31), 2**31 - 1)
    values = rounded.astype(np.int32)
    only = graph.consumers(node.input[2]) == [node]
    name = graph.overwrite(node.input[2], values) if only else graph.shared(values, "b")
    product, output = graph.fresh("s"), graph.fresh("d")
    inputs, axis = [name, product], {}
    weight_scale = graph.constant(scale_w)
    if weight_scale is not None and weight_scale.ndim:
        axis = {"axis": 0}
        if node.op_type == "Gemm":  # fused only with explicit zero points
            inputs.append(zeros(graph, node, len(values), np.int32))
    elif node.op_type == "Gemm":
        inputs.append(graph.shared(np.asarray(0, np.int32), "z"))
    graph.insert_before(
        node,
        graph.node("Mul", [scale_x, scale_w], product, node),
        graph.node("DequantizeLinear", inputs, output, node, **axis),
    )
    node.input[2] = output


def _meets_quantizer(graph: GraphEditor, node: NodeProto) -> bool:
    """Whether QuantizeLinear follows, perhaps behind a clipping activation function."""
    readers = graph.consumers(node.output[0])
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = graph.consumers(readers[0].output[0])
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"


def _requantize(graph: GraphEditor, weight: NodeProto, old: Array, new: Array) -> None:
    """Bring the integers of ``weight`` to coarser scales."""
    source, zero = weight.input[0], np.zeros(())
    while (maker := graph.producer(source)) is not None:  # see _Weight.cast in qdq_weights
        if maker.op_type == "Sub":
            shift = graph.producer(maker.input[1])
            stored = None if shift is None else graph.constant(shift.input[0])
            zero = zero if stored is None else stored.astype(np.float64)
        source = maker.input[0]
    integers = graph.constant(source)
    if integers is None:
        raise ExportError("the integers of a weight are not a constant", where=source)
    shape = (-1, *[1] * (integers.ndim - 1))
    ratio = (old.astype(np.float64) / new).reshape(shape)
    levels = np.rint((integers.astype(np.float64) - zero) * ratio) + zero
    graph.overwrite(source, levels.astype(integers.dtype))
    weight.input[1] = graph.shared(new, "s")
    graph.link(weight)


def _tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float32))
