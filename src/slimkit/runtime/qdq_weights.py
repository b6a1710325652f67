"""How a rounded weight is written: integers in the file, in the form that its reader runs best.

* Between integer activations: int8 and a DequantizeLinear, which the runtime fuses away. Weights
  of up to 4 bits are packed two to a byte and cast to int8, which happens when the file is loaded,
  as does the subtraction of their zero points.
* Under a DynamicQuantizeLinear: MatMulInteger or ConvInteger and a product of both scales.
* A linear layer on floats: DequantizeLinear, with a scale per channel or per block; ONNX Runtime
  multiplies by the packed integers (MatMulNBits).
* A convolution on floats: a cast and a product, which the runtime computes once, when it loads the
  file, so that the convolution runs as fast as a float one. (It does not do that for a
  DequantizeLinear.)
* A table of embeddings: the rows are looked up as integers, their scales likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.errors import ExportError
from slimkit.runtime.onnx_graph import GraphEditor
from slimkit.runtime.qdq_compact import zeros

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["place_weight"]

Array = np.ndarray[Any, Any]
_PRODUCTS = ("MatMul", "Gemm")
_CONVS = ("Conv", "ConvTranspose")


@dataclass
class _Weight:
    """Integers, and the scales to multiply them with.

    Attributes:
        source: name of the initialiser that holds the float weight.
        integers: of the narrowest type.
        scale: shape (), (channels,) on ``axis``, or (out, blocks).
        zero_point: of the shape of ``scale`` and the type of ``integers``; ``None`` if all are 0.
        axis: −1 for one scale in all.
        alone: nothing else reads ``source``.
    """

    source: str
    integers: Array
    scale: Array
    zero_point: Array | None
    axis: int
    alone: bool

    @property
    def blocks(self) -> int | None:
        """Scales per output channel, ``None`` for one."""
        return int(self.scale.shape[1]) if self.scale.ndim == 2 else None

    @property
    def narrow(self) -> bool:
        """Whether two of them fit into a byte."""
        return bool(self.integers.dtype != np.int8)

    def transposed(self) -> _Weight:
        """(out, in) as (in, out)."""
        axis = self.axis if self.axis < 0 else 1 - self.axis
        integers, scale = np.ascontiguousarray(self.integers.T), np.ascontiguousarray(self.scale.T)
        zero_point = None if self.zero_point is None else np.ascontiguousarray(self.zero_point.T)
        return _Weight(self.source, integers, scale, zero_point, axis, self.alone)

    def store(self, graph: GraphEditor, integers: Array | None = None) -> str:
        """The name of the initialiser with the integers."""
        values = self.integers if integers is None else integers
        return graph.overwrite(self.source, values) if self.alone else graph.shared(values, "w")

    def cast(self, graph: GraphEditor, before: NodeProto, kind: int) -> str:
        """The name of the integers minus zero points as another type, made when loading.

        With blocks they are of shape (out, blocks, …).

        Args:
            graph: gets an initialiser, and nodes.
            before: the nodes will stand before it.
            kind: of the ONNX types.
        """
        from onnx import TensorProto

        integers, zero = self.integers, self.zero_point
        if self.blocks is not None:
            integers = integers.reshape(*self.scale.shape, -1)
            zero = None if zero is None else zero[:, :, None]
        elif zero is not None:
            zero = _spread(zero, integers.shape, self.axis)
        # Not every runtime subtracts integers of 8 bits.
        wide = TensorProto.INT32 if zero is not None and kind == TensorProto.INT8 else kind

        def added(operator: str, inputs: list[str], **to: int) -> str:
            node = graph.node(operator, inputs, graph.fresh("w"), before, **to)
            graph.insert_before(before, node)
            return str(node.output[0])

        result = added("Cast", [self.store(graph, integers)], to=wide)
        if zero is not None:
            result = added("Sub", [result, added("Cast", [graph.shared(zero, "z")], to=wide)])
        return result if wide == kind else added("Cast", [result], to=kind)


@dataclass(frozen=True)
class _Readers:
    """Nodes of one kind, and the name of the weight among their inputs."""

    nodes: list[NodeProto]
    weight: str

    def give(self, graph: GraphEditor, name: str) -> None:
        """Let them read ``name``."""
        for node in self.nodes:
            for position, value in enumerate(node.input):
                if value == self.weight:
                    node.input[position] = name
            graph.link(node)


def place_weight(graph: GraphEditor, node: NodeProto) -> bool:
    """Write the constant that the private ``node`` rounds in the form that its readers want.

    Returns:
        Whether that takes operator set 21.

    Raises:
        ExportError: no integer type holds it.
    """
    weight = _rounded(graph, node)
    readers = graph.consumers(node.output[0])
    if len(readers) == 1 and readers[0].op_type == "Transpose" and weight.integers.ndim == 2:
        output = readers[0].output[0]
        graph.remove(readers[0])
        weight = weight.transposed()
        readers = graph.consumers(output)
    else:
        output = node.output[0]
    kinds = {_kind(graph, reader, output) for reader in readers}
    if len(kinds) > 1:
        weight.alone = False
    for kind in sorted(kinds):
        chosen = [reader for reader in readers if _kind(graph, reader, output) == kind]
        _WRITERS[kind](graph, node, weight, _Readers(chosen, output))
    graph.remove(node)
    return weight.narrow or weight.blocks is not None


def _rounded(graph: GraphEditor, node: NodeProto) -> _Weight:
    from ml_dtypes import int4

    axis, qmin, qmax = (int(graph.attribute(node, name)) for name in ("axis", "qmin", "qmax"))
    values, scale, zero_point = (graph.constant(name) for name in node.input[:3])
    if values is None or scale is None or zero_point is None:
        raise ExportError("the scale of a quantizer is not a constant", where=node.input[0])
    narrow = qmin >= -8 and qmax <= 7
    if qmin < -128 or qmax > 127 or (zero_point.any() and not narrow):
        raise ExportError(f"no 8-bit type holds {qmin} … {qmax}", where=node.input[0])
    levels = np.rint(values / _spread(scale, values.shape, axis))
    levels += _spread(zero_point, values.shape, axis)
    kind = int4 if narrow else np.int8
    integers = np.clip(levels, qmin, qmax).astype(kind)
    alone = graph.consumers(node.input[0]) == [node]
    shift = zero_point.astype(kind) if zero_point.any() else None
    return _Weight(node.input[0], integers, scale.astype(np.float32), shift, axis, alone)


def _spread(scale: Array, shape: tuple[int, ...], axis: int) -> Array:
    """``scale`` so that it broadcasts against a weight of ``shape``."""
    if scale.ndim == 2:
        wide = np.repeat(scale, shape[1] // scale.shape[1], axis=1)
        return wide.reshape(*wide.shape, *[1] * (len(shape) - 2))
    return (
        scale.reshape([-1 if axis == d else 1 for d in range(len(shape))]) if axis >= 0 else scale
    )


def _kind(graph: GraphEditor, reader: NodeProto, output: str) -> str:
    if reader.op_type == "Gather" and reader.input[0] == output:
        return "table"
    source = graph.producer(reader.input[0])
    quantized = source is not None and source.op_type == "DequantizeLinear"
    before = graph.producer(source.input[0]) if source is not None and quantized else None
    if before is not None and before.op_type == "DynamicQuantizeLinear":
        return "dynamic" if reader.op_type in (*_PRODUCTS, "Conv") else "dequantized"
    if quantized:
        return "integer"
    return "folded" if reader.op_type in _CONVS else "dequantized"


def _integer(graph: GraphEditor, node: NodeProto, weight: _Weight, readers: _Readers) -> None:
    """Int8 and DequantizeLinear."""
    inputs = [_as_int8(graph, node, weight), graph.shared(weight.scale, "s")]
    if any(reader.op_type == "Gemm" for reader in readers.nodes):
        # ONNX Runtime fuses Gemm only with explicit zero points.
        zero = np.zeros((), np.int8)
        channels = weight.scale.size
        vector = weight.scale.ndim == 1
        inputs.append(zeros(graph, node, channels, np.int8) if vector else graph.shared(zero, "z"))
    _dequantize(graph, node, inputs, readers, axis=weight.axis)


def _dequantized(graph: GraphEditor, node: NodeProto, weight: _Weight, readers: _Readers) -> None:
    """Whatever type, and DequantizeLinear, with inputs first as MatMulNBits wants them."""
    turned = weight.integers.ndim == 2 and all(_turned(graph, reader) for reader in readers.nodes)
    if turned:
        for reader in readers.nodes:
            _set_integer(reader, "transB", 0)
        weight = weight.transposed()
    inputs = [weight.store(graph), graph.shared(weight.scale, "s")]
    if weight.zero_point is not None:
        inputs.append(graph.shared(weight.zero_point, "z"))
    block, axis = {}, weight.axis
    if weight.scale.ndim == 2:
        axis = int(weight.scale.shape[0] == weight.integers.shape[0])
        block = {"block_size": weight.integers.shape[axis] // weight.scale.shape[axis]}
    _dequantize(graph, node, inputs, readers, axis=axis, **block)


def _folded(graph: GraphEditor, node: NodeProto, weight: _Weight, readers: _Readers) -> None:
    """Casts and products, which are gone when the file is loaded."""
    from onnx import TensorProto

    shape, in_blocks = weight.integers.shape, weight.blocks is not None
    scale = weight.scale[:, :, None] if in_blocks else _spread(weight.scale, shape, weight.axis)
    cast = weight.cast(graph, node, TensorProto.FLOAT)
    product = graph.fresh("w")
    made = [graph.node("Mul", [cast, graph.shared(scale, "s")], product, node)]
    if in_blocks:
        target = graph.shared(np.asarray(shape, np.int64), "c")
        made.append(graph.node("Reshape", [product, target], graph.fresh("w"), node))
    graph.insert_before(node, *made)
    readers.give(graph, made[-1].output[0])


def _dynamic(graph: GraphEditor, node: NodeProto, weight: _Weight, readers: _Readers) -> None:
    """MatMulInteger or ConvInteger, both scales, and a bias in float."""
    if all(_turned(graph, reader) for reader in readers.nodes):
        weight = weight.transposed()
    name = _as_int8(graph, node, weight)
    for reader in readers.nodes:
        conv = reader.op_type == "Conv"
        source = graph.producer(reader.input[0])
        if source is None:  # what _kind has seen
            continue
        integers, step, zero_point = source.input
        scale = (
            weight.scale.reshape(-1, *[1] * (weight.integers.ndim - 2)) if conv else weight.scale
        )
        _write_dynamic(graph, reader, [integers, name, zero_point], step, scale)
        if not graph.consumers(source.output[0]):
            graph.remove(source)


def _write_dynamic(
    graph: GraphEditor, reader: NodeProto, inputs: list[str], step: str, scale: Array
) -> None:
    from onnx import TensorProto

    conv = reader.op_type == "Conv"
    total, cast, factor = (graph.fresh("t") for _ in range(3))
    first = graph.node("ConvInteger" if conv else "MatMulInteger", inputs, total, reader)
    if conv:
        first.attribute.extend(reader.attribute)
    bias = reader.input[2] if len(reader.input) > 2 else None
    result = reader.output[0]
    product = result if bias is None else graph.fresh("t")
    made = [
        first,
        graph.node("Cast", [total], cast, reader, to=TensorProto.FLOAT),
        graph.node("Mul", [step, graph.shared(scale, "s")], factor, reader),
        graph.node("Mul", [cast, factor], product, reader),
    ]
    if bias is not None:
        values = graph.constant(bias)
        if conv and values is not None:
            bias = graph.shared(values.reshape(-1, *[1] * (scale.ndim - 1)), "b")
        made.append(graph.node("Add", [product, bias], result, reader))
    graph.replace(reader, *made)


def _table(graph: GraphEditor, node: NodeProto, weight: _Weight, readers: _Readers) -> None:
    """Rows as integers, times their scales."""
    from onnx import TensorProto

    name = _as_int8(graph, node, weight)
    for reader in readers.nodes:
        ids, rows, cast = reader.input[1], graph.fresh("t"), graph.fresh("t")
        made = [
            graph.node("Gather", [name, ids], rows, reader),
            graph.node("Cast", [rows], cast, reader, to=TensorProto.FLOAT),
        ]
        scale = graph.shared(weight.scale[:, None] if weight.scale.ndim else weight.scale, "s")
        if weight.scale.ndim:
            made.append(graph.node("Gather", [scale, ids], graph.fresh("t"), reader))
            scale = made[-1].output[0]
        made.append(graph.node("Mul", [cast, scale], reader.output[0], reader))
        graph.replace(reader, *made)


_WRITERS = {
    "dequantized": _dequantized,
    "dynamic": _dynamic,
    "folded": _folded,
    "integer": _integer,
    "table": _table,
}


def _as_int8(graph: GraphEditor, node: NodeProto, weight: _Weight) -> str:
    """The name of the integers as int8: 4-bit ones are stored packed and cast."""
    from onnx import TensorProto

    return weight.cast(graph, node, TensorProto.INT8) if weight.narrow else weight.store(graph)


def _dequantize(
    graph: GraphEditor,
    node: NodeProto,
    inputs: list[str],
    readers: _Readers,
    *,
    axis: int,
    **attributes: int,
) -> None:
    made = graph.fresh("w")
    extra = {"axis": axis, **attributes} if axis >= 0 else attributes
    graph.insert_before(node, graph.node("DequantizeLinear", inputs, made, node, **extra))
    readers.give(graph, made)


def _turned(graph: GraphEditor, reader: NodeProto) -> bool:
    """Whether it is a Gemm on a weight (out, in)."""
    return reader.op_type == "Gemm" and graph.attribute(reader, "transB") == 1


def _set_integer(node: NodeProto, name: str, value: int) -> None:
    for entry in node.attribute:
        if entry.name == name:
            entry.i = value
