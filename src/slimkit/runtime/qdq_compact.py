"""Fewer bytes for what is stored per channel, undone by the runtime when it loads the file.

A small network has so many channels that the scales and biases next to its int8 weights are a tenth
of the file. Scales out of a short list are stored as one byte each and looked up
(:func:`looked_up`); biases may be 16-bit floats (:mod:`slimkit.runtime.qdq_biases`); vectors of
zeros are made by a node. All of it depends on constants only, and ONNX Runtime computes it once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.runtime.onnx_graph import GraphEditor

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["looked_up", "unpacked", "zeros"]

Array = np.ndarray[Any, Any]

_WORTH = 32
"""Shorter vectors stay as they are: the nodes take as many bytes."""


def looked_up(graph: GraphEditor) -> None:
    """Write long vectors of scales as bytes, if there are at most 256 different values.

    When there are more, the vectors that the 256 most frequent ones suffice for are written so.
    """
    vectors: dict[str, Array] = {}
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
    places = {name: np.searchsorted(table, v).astype(np.uint8) for name, v in chosen.items()}
    together = {name: indices for name, indices in places.items() if indices.ndim == 1}
    unpacked(graph, together, palette)
    for name, indices in places.items():
        if name not in together:
            unpacked(graph, {name: indices}, palette)


def unpacked(graph: GraphEditor, short: Mapping[str, Array], palette: str | None = None) -> None:
    """Store constants behind each other in a shorter type, and take them apart when loading.

    That is two or three nodes for any number of layers.

    Args:
        graph: changed in place.
        short: name of a constant → what to store instead; vectors, or a single one of any shape.
        palette: name of the values that ``short`` holds indices into; by default its numbers are
            16-bit floats.
    """
    from onnx import TensorProto

    if not short:
        return
    parts = list(short.values())
    readers = [reader for name in short for reader in graph.consumers(name)]
    first = min(readers, key=graph.position)
    names = [graph.fresh("s") for _ in short]
    for old, new in zip(short, names, strict=True):
        graph.redirect(old, new)
    whole = names[0] if len(parts) == 1 else graph.fresh("s")
    stored = graph.shared(parts[0] if len(parts) == 1 else np.concatenate(parts), "i")
    if palette is None:
        made = [graph.node("Cast", [stored], whole, first, to=TensorProto.FLOAT)]
    else:
        wide = graph.fresh("c")
        made = [
            graph.node("Cast", [stored], wide, first, to=TensorProto.INT32),
            graph.node("Gather", [palette, wide], whole, first),
        ]
    if len(parts) > 1:
        lengths = graph.shared(np.asarray([len(part) for part in parts], np.int64), "c")
        made.append(graph.node("Split", [whole, lengths], names, first))
    graph.insert_before(first, *made)


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
