"""From fake-quantize nodes to the QDQ form of ONNX that runtimes turn into integer kernels.

The export writes every rounding as one node of a private domain, which no optimizer touches.
:func:`to_qdq` then replaces these nodes:

* on an activation: QuantizeLinear and DequantizeLinear, one pair per value;
* on a weight: see :mod:`slimkit.runtime.qdq_weights`;
* a ReLU or Clip right before a QuantizeLinear that saturates at the same bounds goes away;
* pooling, reshaping and the like get a pair with their input's scale, so that they can stay
  among the integers;
* biases: see :mod:`slimkit.runtime.qdq_biases`.

What ONNX Runtime asks for on x86 is described in its `quantization guide
<https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html>`_.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.errors import ExportError
from slimkit.runtime.export_hooks import BIASES_HINT, OPSET_HINT, SCALES_HINT
from slimkit.runtime.onnx_graph import GraphEditor
from slimkit.runtime.qdq_biases import write_biases
from slimkit.runtime.qdq_compact import looked_up
from slimkit.runtime.qdq_pads import pads_into_convolutions
from slimkit.runtime.qdq_weights import place_weight

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["DOMAIN", "emit_dynamic_fake_quantize", "emit_fake_quantize", "to_qdq"]

DOMAIN = "slimkit"
"""Of the private nodes; no exported file contains it."""
_STATIC, _DYNAMIC = "FakeQuantize", "DynamicFakeQuantize"
_NEWER = 21  # the operator set that has 4-bit integers and scales per block
_SAME_SCALE = {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "MaxPool",
    "Pad",
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
    types = {"x": "T", "scale": "S", "zero_point": "Z"}
    operator = _operator(_STATIC, types, ("axis", "qmin", "qmax"))
    return operator(x, scale, zero_point, axis=axis, qmin=qmin, qmax=qmax)


def emit_dynamic_fake_quantize(x: Any, qmin: int, qmax: int) -> Any:
    """The same for ``slimkit::dynamic_fake_quantize``."""
    return _operator(_DYNAMIC, {"x": "T"}, ("qmin", "qmax"))(x, qmin=qmin, qmax=qmax)


def _operator(name: str, inputs: dict[str, str], attributes: tuple[str, ...]) -> Any:
    import onnx.defs
    from onnxscript import values

    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    kinds = {
        "T": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
        "S": ["tensor(float)"],
        "Z": ["tensor(int32)"],
    }
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter(key, kind) for key, kind in inputs.items()],
        outputs=[parameter("y", "T")],
        type_constraints=[(kind, kinds[kind], "") for kind in inputs.values()],
        attributes=[attribute(key, onnx.defs.OpSchema.AttrType.INT, "") for key in attributes],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def to_qdq(model: ModelProto) -> None:
    """Replace all fake-quantize nodes of ``model`` in place; without any it stays as it is.

    Raises:
        ExportError: a scale is not a constant, 8 bits cannot hold its integers, or the operator
            set is too old for what the file has to say.
    """
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return
    hints = {entry.key: entry.value for entry in model.metadata_props}
    graph = GraphEditor(model.graph)
    _unwrap_names(graph)
    weights = [node for node in graph.nodes if _is_weight(graph, node)]
    _round_activations(graph)
    _pool_before_flatten(graph)
    _drop_saturated_activations(graph)
    pads_into_convolutions(graph)
    _keep_scale_through(graph)
    newer = [place_weight(graph, node) for node in weights]
    biases = hints.get(BIASES_HINT, "int32")
    if biases != "float":
        write_biases(graph, short=biases == "float16")
    _hard_sigmoids(graph)
    if hints.get(SCALES_HINT) == "bytes":
        looked_up(graph)
    graph.commit()
    for opset in [entry for entry in model.opset_import if entry.domain == DOMAIN]:
        model.opset_import.remove(opset)
    _check_opset(model, max(int(hints.get(OPSET_HINT, "1")), _NEWER if any(newer) else 1))


def _check_opset(model: ModelProto, oldest: int) -> None:
    version = next(entry.version for entry in model.opset_import if entry.domain == "")
    if version < oldest:
        raise ExportError(
            f"the weights or the target need operator set {oldest}, not {version}",
            where="opset",
            hint=f"use opset={oldest}",
        )


def _unwrap_names(graph: GraphEditor) -> None:
    """Parameters and modules by their path in the network, not in the wrapper around it."""
    wrapped, plain = "model.model.", "model."
    for name in graph.constants():
        if name.startswith(wrapped):
            graph.rename_constant(name, plain + name.removeprefix(wrapped))
    for node in graph.nodes:
        for entry in node.metadata_props:
            entry.value = entry.value.replace(f"'{wrapped}", f"'{plain}")


def _is_weight(graph: GraphEditor, node: NodeProto) -> bool:
    private = node.op_type == _STATIC and node.domain == DOMAIN
    return private and graph.constant(node.input[0]) is not None


def _round_activations(graph: GraphEditor) -> None:
    """Q/DQ pairs, one per value and scale, in place of the nodes on computed values."""
    pairs: dict[tuple[str, ...], str] = {}
    for node in list(graph.nodes):
        if node.domain != DOMAIN or _is_weight(graph, node):
            continue
        place = _place_static if node.op_type == _STATIC else _place_dynamic
        place(graph, node, pairs)


def _place_static(graph: GraphEditor, node: NodeProto, pairs: dict[tuple[str, ...], str]) -> None:
    x, (qmin, qmax) = node.input[0], _range(graph, node)
    kind = np.dtype(np.int8 if qmin < 0 else np.uint8)
    scale, zero_point = (graph.constant(name) for name in node.input[1:3])
    if scale is None or zero_point is None:
        raise ExportError("the scale of a quantizer is not a constant", where=x)
    s_name = graph.shared(scale.astype(np.float32), "s")
    z_name = graph.shared(zero_point.astype(kind), "z")
    if _reuse(graph, node, (x, s_name, z_name, str(qmax)), pairs):
        return
    clip = []
    if qmax - qmin < 254:  # the runtime would use all of the 8 bits
        ends = (((q - zero_point) * scale).astype(np.float32) for q in (qmin, qmax))
        bounds = [graph.shared(end, "b") for end in ends]
        clip = [graph.node("Clip", [x, *bounds], graph.fresh("p"), node)]
        x = clip[0].output[0]
    quantized = graph.fresh("q")
    q_node = graph.node("QuantizeLinear", [x, s_name, z_name], quantized, node)
    dq_node = graph.node("DequantizeLinear", [quantized, s_name, z_name], node.output[0], node)
    graph.replace(node, *clip, q_node, dq_node)


def _place_dynamic(graph: GraphEditor, node: NodeProto, pairs: dict[tuple[str, ...], str]) -> None:
    x, (qmin, qmax) = node.input[0], _range(graph, node)
    if qmax - qmin != 255:
        raise ExportError("activations with scales of each batch have 8 bits", where=x)
    if _reuse(graph, node, (x,), pairs):
        return
    names = [graph.fresh(prefix) for prefix in "qsz"]
    q_node = graph.node("DynamicQuantizeLinear", [x], names, node)
    graph.replace(node, q_node, graph.node("DequantizeLinear", names, node.output[0], node))


def _reuse(
    graph: GraphEditor, node: NodeProto, key: tuple[str, ...], pairs: dict[tuple[str, ...], str]
) -> bool:
    """Whether an equal pair is there already, and takes the place of ``node``."""
    if key in pairs and not graph.is_output(node.output[0]):
        graph.redirect(node.output[0], pairs[key])
        graph.remove(node)
        return True
    pairs.setdefault(key, node.output[0])
    return False


def _range(graph: GraphEditor, node: NodeProto) -> tuple[int, int]:
    qmin, qmax = (int(graph.attribute(node, name)) for name in ("qmin", "qmax"))
    if qmin < -128 or qmax > (127 if qmin < 0 else 255):
        raise ExportError(f"no 8-bit type holds {qmin} … {qmax}", where=node.input[0])
    return qmin, qmax


def _hard_sigmoids(graph: GraphEditor) -> None:
    """HardSigmoid between integers as a change of scale, which runtimes do by a table.

    ``clip(x / 6 + 1/2, 0, 1)`` on a grid of 1/256 is ``x`` with a scale six times smaller, 128
    levels up, saturated. A LeakyRelu of slope 1 carries it: ONNX Runtime has an integer kernel for
    that one and none for HardSigmoid.
    """
    for node in list(graph.nodes):
        source = graph.producer(node.input[0]) if node.input else None
        pair = graph.quantization_of(node.input[0]) if node.input else None
        readers = graph.consumers(node.output[0])
        if node.op_type != "HardSigmoid" or source is None or pair is None or len(readers) != 1:
            continue
        if readers[0].op_type != "QuantizeLinear":
            continue
        scale, zero = (graph.constant(name) for name in readers[0].input[1:3])
        step = graph.constant(pair[0])
        if scale is None or zero is None or step is None:
            continue
        if float(scale) * 256 != 1 or int(zero) != np.iinfo(zero.dtype).min:
            continue
        sixth = graph.shared(np.asarray(step / np.float32(6), np.float32), "s")
        inputs, plain = [source.input[0], sixth, pair[1]], graph.fresh("d")
        leaky = graph.node("LeakyRelu", [plain], node.output[0], node, alpha=1.0)
        graph.replace(node, graph.node("DequantizeLinear", inputs, plain, node), leaky)
        readers[0].input[2] = graph.shared(np.asarray(int(zero) + 128, zero.dtype), "z")


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
        pair = graph.quantization_of(node.input[0]) if node.input else None
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
