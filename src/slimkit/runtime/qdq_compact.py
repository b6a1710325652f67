"""Fewer bytes for what is stored per channel, undone by the runtime when it loads the file.

A small network has so many channels that the scales and biases next to its int8 weights are a tenth
of the file. Scales out of a short list are stored as one byte each and looked up
(:func:`looked_up`); biases may be 16-bit floats (:mod:`slimkit.runtime.qdq_biases`); vectors of
zeros are made by a node. All of it depends on constants only, and ONNX Runtime computes it once.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.runtime.onnx_graph import GraphEditor

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["looked_up", "zeros"]

_WORTH = 32
"""Shorter vectors stay as they are: the nodes take as many bytes."""


def looked_up(graph: GraphEditor) -> None:
    """Write long vectors of scales as bytes, if there are at most 256 different values.

    When there are more, the vectors that the 256 most frequent ones suffice for are written so.
    """
    vectors: dict[str, np.ndarray[Any, Any]] = {}
    for node in graph.nodes:
        for name in node.input[1:2] if node.op_type == "DequantizeLinear" else node.input:
            values = graph.constant(name) if _reads_scale(graph, node, name) else None
            if values is not None and values.dtype == np.float32 and values.size >= _WORTH:
                vectors[name] = values
    counts = Counter(value for values in vectors.values() for value in values.reshape(-1).tolist())
    table = np.sort(np.asarray([v for v, _ in counts.most_common(256)], np.float32))
    chosen = {name: v for name, v in vectors.items() if np.isin(v, table).all()}
    if sum(values.size for values in chosen.values()) * 3 <= 4 * len(table) + 64 * len(chosen):
        return
    palette = graph.shared(table, "c")
    for name, values in chosen.items():
        _look_up(graph, name, np.searchsorted(table, values).astype(np.uint8), palette)


def zeros(graph: GraphEditor, before: NodeProto, length: int, kind: type) -> str:
    """The name of a vector of ``length`` zeros, for a node that will stand before ``before``."""
    from onnx import numpy_helper

    if length < _WORTH:
        return graph.shared(np.zeros(length, kind), "z")
    shape, made = graph.shared(np.asarray([length], np.int64), "c"), graph.fresh("z")
    value = numpy_helper.from_array(np.zeros(1, kind))
    graph.insert_before(before, graph.node("ConstantOfShape", [shape], made, before, value=value))
    return made


def _reads_scale(graph: GraphEditor, node: NodeProto, name: str) -> bool:
    """Whether ``name`` is the scale of a weight, as every form of weight has it."""
    if node.op_type == "DequantizeLinear":
        return graph.attribute(node, "axis") is not None
    return node.op_type == "Mul" or (node.op_type == "Gather" and name == node.input[0])


def _look_up(graph: GraphEditor, name: str, indices: np.ndarray[Any, Any], palette: str) -> None:
    from onnx import TensorProto

    first = min(graph.consumers(name), key=graph.position)
    wide, scale = graph.fresh("c"), graph.fresh("s")
    graph.redirect(name, scale)
    graph.insert_before(
        first,
        graph.node("Cast", [graph.shared(indices, "i")], wide, first, to=TensorProto.INT32),
        graph.node("Gather", [palette, wide], scale, first),
    )
