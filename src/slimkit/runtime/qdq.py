"""From fake-quantize nodes to the QDQ form of ONNX that runtimes turn into integer kernels.

The export writes every ``slimkit::fake_quantize`` as one node of a private domain, which no
optimizer touches. :func:`to_qdq` then replaces these nodes:

* on a weight: the rounded int8 tensor takes the float tensor's place, followed by a
  DequantizeLinear only;
* on an activation: QuantizeLinear and DequantizeLinear, one pair per value;
* biases of convolutions and linear layers become int32 with scale ``s_x · s_w``;
* a ReLU or Clip right before a QuantizeLinear that saturates at the same bounds goes away;
* pooling, reshaping and the like get a pair with their input's scale, so that they can stay
  among the integers.

What ONNX Runtime asks for on x86 is described in its `quantization guide
<https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html>`_.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.errors import ExportError
from slimkit.runtime.onnx_graph import GraphEditor

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["DOMAIN", "emit_fake_quantize", "to_qdq"]

DOMAIN = "slimkit"
"""Of the private nodes; no exported file contains it."""
_NODE = "FakeQuantize"
_SAME_SCALE = {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "MaxPool",
    "Reshape",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Operators whose outputs are values of their input: they need no scale of their own."""


def emit_fake_quantize(x: Any, scale: Any, zero_point: Any, axis: int, qmin: int, qmax: int) -> Any:
    """The ONNX translation of ``slimkit::fake_quantize``: one node of the private domain."""
    import onnx.defs
    from onnxscript import values

    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    integer = onnx.defs.OpSchema.AttrType.INT
    schema = onnx.defs.OpSchema(
        _NODE,
        DOMAIN,
        1,
        inputs=[parameter("x", "T"), parameter("scale", "S"), parameter("zero_point", "Z")],
        outputs=[parameter("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("S", ["tensor(float)"], ""),
            ("Z", ["tensor(int32)"], ""),
        ],
        attributes=[attribute(name, integer, "") for name in ("axis", "qmin", "qmax")],
    )
    operator = values.Op(values.Opset(DOMAIN, 1), _NODE, schema)
    return operator(x, scale, zero_point, axis=axis, qmin=qmin, qmax=qmax)


def to_qdq(model: ModelProto) -> None:
    """Replace all fake-quantize nodes of ``model`` in place; without any it stays as it is.

    Raises:
        ExportError: a scale is not a constant, or 8 bits cannot hold its integers.
    """
    if not any(node.op_type == _NODE and node.domain == DOMAIN for node in model.graph.node):
        return
    graph = GraphEditor(model.graph)
    _unwrap_names(graph)
    _replace_nodes(graph)
    _pool_before_flatten(graph)
    _drop_saturated_activations(graph)
    _keep_scale_through(graph)
    _biases_to_int32(graph)
    graph.commit()
    for opset in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
        model.opset_import.remove(opset)


def _unwrap_names(graph: GraphEditor) -> None:
    """Parameters and modules by their path in the network, not in the wrapper around it."""
    wrapped, plain = "model.model.", "model."
    for name in graph.constants():
        if name.startswith(wrapped):
            graph.rename_constant(name, plain + name.removeprefix(wrapped))
    for node in graph.nodes:
        for entry in node.metadata_props:
            entry.value = entry.value.replace(f"'{wrapped}", f"'{plain}")


def _replace_nodes(graph: GraphEditor) -> None:
    """Weights to int8 constants, activations to Q/DQ pairs, one per value and scale."""
    pairs: dict[tuple[str, str, str], str] = {}
    for node in list(graph.nodes):
        if node.op_type != _NODE or node.domain != DOMAIN:
            continue
        attributes = {entry.name: entry.i for entry in node.attribute}
        axis, qmin, qmax = (attributes[name] for name in ("axis", "qmin", "qmax"))
        x, kind = node.input[0], np.dtype(np.int8 if qmin < 0 else np.uint8)
        scale, zero_point = (graph.constant(name) for name in node.input[1:3])
        if scale is None or zero_point is None:
            raise ExportError("the scale of a quantizer is not a constant", where=x)
        if qmin < -128 or qmax > (127 if qmin < 0 else 255):
            raise ExportError(f"no 8-bit type holds {qmin} … {qmax}", where=x)
        values = graph.constant(x)
        if values is not None:
            shape = [-1 if axis == d else 1 for d in range(values.ndim)] if axis >= 0 else []
            levels = np.rint(values / scale.reshape(shape)) + zero_point.reshape(shape)
            integers = np.clip(levels, qmin, qmax).astype(kind)
            _place_weight(graph, node, integers, scale, zero_point.astype(kind), axis)
            continue
        s_name = graph.shared(scale.astype(np.float32), "s")
        z_name = graph.shared(zero_point.astype(kind), "z")
        key = (x, s_name, z_name)
        if key in pairs and not graph.is_output(node.output[0]):
            graph.redirect(node.output[0], pairs[key])
            graph.remove(node)
            continue
        pairs.setdefault(key, node.output[0])
        quantized = graph.fresh("q")
        extra = {"axis": axis} if axis >= 0 else {}
        q_node = graph.node("QuantizeLinear", [x, s_name, z_name], quantized, node, **extra)
        inputs = [quantized, s_name, z_name]
        dq_node = graph.node("DequantizeLinear", inputs, node.output[0], node, **extra)
        graph.replace(node, q_node, dq_node)


def _place_weight(
    graph: GraphEditor,
    node: NodeProto,
    integers: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    zero_point: np.ndarray[Any, Any],
    axis: int,
) -> None:
    """Put ``integers`` and a DequantizeLinear in place of a fake-quantized constant.

    A Transpose behind it (of a linear layer on more than two dimensions) is carried out.
    """
    output, source = node.output[0], node.input[0]
    readers = graph.consumers(output)
    if len(readers) == 1 and readers[0].op_type == "Transpose":
        order = graph.attribute(readers[0], "perm") or list(range(integers.ndim))[::-1]
        integers = np.ascontiguousarray(integers.transpose(order))
        axis = order.index(axis) if axis >= 0 else axis
        output = readers[0].output[0]
        graph.remove(readers[0])
    only_reader = graph.consumers(source) == [node]
    name = graph.overwrite(source, integers) if only_reader else graph.shared(integers, "w")
    inputs = [name, graph.shared(scale.astype(np.float32), "s")]
    gemm = any(reader.op_type == "Gemm" for reader in graph.consumers(output))
    if gemm or zero_point.any():  # ONNX Runtime fuses Gemm only with explicit zero points
        inputs.append(graph.shared(zero_point, "z"))
    extra = {"axis": axis} if axis >= 0 else {}
    graph.replace(node, graph.node("DequantizeLinear", inputs, output, node, **extra))


def _drop_saturated_activations(graph: GraphEditor) -> None:
    """Remove ReLU and Clip whose bounds the QuantizeLinear behind them imposes anyway."""
    for node in list(graph.nodes):
        bounds = _clip_bounds(graph, node)
        readers = graph.consumers(node.output[0])
        if bounds is None or not readers or graph.is_output(node.output[0]):
            continue
        if all(_saturates_at(graph, reader, *bounds) for reader in readers):
            graph.redirect(node.output[0], node.input[0])
            graph.remove(node)


def _clip_bounds(graph: GraphEditor, node: NodeProto) -> tuple[float, float] | None:
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    limits = [-np.inf, np.inf]
    for position, name in enumerate(node.input[1:3]):
        value = graph.constant(name) if name else None
        if name and value is None:
            return None
        if value is not None:
            limits[position] = float(value)
    return limits[0], limits[1]


def _saturates_at(graph: GraphEditor, node: NodeProto, low: float, high: float) -> bool:
    if node.op_type != "QuantizeLinear" or graph.attribute(node, "axis") is not None:
        return False
    scale, zero_point = (graph.constant(name) for name in node.input[1:3])
    if scale is None or zero_point is None:
        return False
    kind = np.iinfo(zero_point.dtype)
    below = np.rint(low / float(scale)) + float(zero_point) <= kind.min
    return bool(below and np.rint(high / float(scale)) + float(zero_point) >= kind.max)


def _quantization_of(graph: GraphEditor, value: str) -> list[str] | None:
    """Names of scale and zero point when ``value`` comes from a per-tensor DequantizeLinear."""
    node = graph.producer(value)
    if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
        return None
    return None if graph.attribute(node, "axis") is not None else list(node.input[1:3])


def _pool_before_flatten(graph: GraphEditor) -> None:
    """A mean over (H, W) that drops these axes → GlobalAveragePool, Q/DQ, Flatten."""
    for node in list(graph.nodes):
        readers = graph.consumers(node.output[0])
        if (
            node.op_type != "ReduceMean"
            or graph.attribute(node, "keepdims") != 0
            or graph.rank(node.input[0]) != 4
            or len(readers) != 1
            or readers[0].op_type != "QuantizeLinear"
        ):
            continue
        axes = graph.constant(node.input[1]) if len(node.input) > 1 else None
        pairs = graph.consumers(readers[0].output[0])
        if axes is None or {int(a) % 4 for a in axes.reshape(-1)} != {2, 3} or len(pairs) != 1:
            continue
        pooled = graph.node("GlobalAveragePool", [node.input[0]], node.output[0], node)
        graph.replace(node, pooled)
        kept, flat = graph.fresh("d"), pairs[0].output[0]
        dequantize = graph.node("DequantizeLinear", list(pairs[0].input), kept, pairs[0])
        graph.replace(pairs[0], dequantize, graph.node("Flatten", [kept], flat, node, axis=1))


def _keep_scale_through(graph: GraphEditor) -> None:
    """A Q/DQ pair with the input's own scale behind every operator that only moves values."""
    for node in list(graph.nodes):
        pair = _quantization_of(graph, node.input[0]) if node.input else None
        moves = node.op_type in _SAME_SCALE or (
            node.op_type == "Resize" and graph.attribute(node, "mode") == b"nearest"
        )
        if pair is None or not moves:
            continue
        for position, value in enumerate(node.output):
            readers = graph.consumers(value)
            if graph.is_output(value) or not readers:
                continue
            if all(r.op_type == "QuantizeLinear" and list(r.input[1:3]) == pair for r in readers):
                continue
            plain, quantized = graph.fresh("p"), graph.fresh("q")
            node.output[position] = plain
            graph.insert_after(
                node,
                graph.node("QuantizeLinear", [plain, *pair], quantized, node),
                graph.node("DequantizeLinear", [quantized, *pair], value, node),
            )


def _biases_to_int32(graph: GraphEditor) -> None:
    """Constant biases between integer input and integer weight, on the accumulator's scale."""
    for node in list(graph.nodes):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        bias = graph.constant(node.input[2])
        pair = _quantization_of(graph, node.input[0])
        weight = graph.producer(node.input[1])
        if bias is None or pair is None or weight is None or weight.op_type != "DequantizeLinear":
            continue
        scale_x, scale_w = graph.constant(pair[0]), graph.constant(weight.input[1])
        integers = graph.constant(weight.input[0])
        if scale_x is None or scale_w is None or integers is None or integers.dtype != np.int8:
            continue
        wide = np.broadcast_to(scale_w, bias.shape).astype(np.float64)
        excess = np.abs(bias) / (float(scale_x) * wide * (2**31 - 1))
        if (excess > 1).any():
            if scale_w.ndim == 0 or graph.attribute(weight, "axis") not in (0, None):
                continue  # it stays in float, and so does this layer
            # Channels of hardly any weight under a large bias: a coarser step for the weight.
            wide = wide * np.maximum(excess, 1)
            _requantize(graph, weight, integers, scale_w, wide.astype(np.float32))
        scale = (np.float32(scale_x) * wide.astype(np.float32)).astype(np.float32)
        rounded = np.clip(np.rint(bias / scale.astype(np.float64)), -(2**31), 2**31 - 1)
        only = graph.consumers(node.input[2]) == [node]
        values = rounded.astype(np.int32)
        name = graph.overwrite(node.input[2], values) if only else graph.shared(values, "b")
        output = graph.fresh("d")
        inputs = [name, graph.shared(scale, "s")]
        if node.op_type == "Gemm":
            inputs.append(graph.shared(np.zeros_like(values), "z"))
        graph.insert_before(node, graph.node("DequantizeLinear", inputs, output, node, axis=0))
        node.input[2] = output


def _requantize(
    graph: GraphEditor,
    weight: NodeProto,
    integers: np.ndarray[Any, Any],
    old: np.ndarray[Any, Any],
    new: np.ndarray[Any, Any],
) -> None:
    shape = (-1, *[1] * (integers.ndim - 1))
    ratio = (old.astype(np.float64) / new).reshape(shape)
    graph.overwrite(weight.input[0], np.rint(integers * ratio).astype(np.int8))
    weight.input[1] = graph.shared(new, "s")
