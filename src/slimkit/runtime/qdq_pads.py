"""Padding with zeros in front of a convolution, as one of its attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimkit.runtime.onnx_graph import GraphEditor

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["pads_into_convolutions"]


def pads_into_convolutions(graph: GraphEditor) -> None:
    """Take out every Pad that only convolutions read, and pad by as much more in these.

    Networks that pad unevenly (TensorFlow's "same") do so by an operator of its own, which no
    runtime computes among integers. Zero is exact on every grid, so nothing changes.
    """
    for node in list(graph.nodes):
        border = _spatial_border(graph, node)
        if border is None:
            continue
        padded = _rounded(graph, node.output[0])
        readers = graph.consumers(padded)
        if not readers or any(graph.is_output(value) for value in (node.output[0], padded)):
            continue
        if any(r.op_type != "Conv" or r.input[0] != padded for r in readers):
            continue
        if any(graph.attribute(r, "auto_pad") not in (None, b"NOTSET") for r in readers):
            continue
        for reader in readers:
            _pad_more(graph, reader, border)
        graph.redirect(node.output[0], node.input[0])
        graph.remove(node)


def _rounded(graph: GraphEditor, value: str) -> str:
    """``value`` behind its Q/DQ pair, if that is all that reads it."""
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        readers = graph.consumers(value)
        if len(readers) != 1 or readers[0].op_type != operator:
            return value
        value = readers[0].output[0]
    return value


def _spatial_border(graph: GraphEditor, node: NodeProto) -> list[int] | None:
    """Rows and columns of zeros that a Pad adds, all begins, all ends; ``None`` for other nodes."""
    if node.op_type != "Pad" or graph.attribute(node, "mode") not in (None, b"constant"):
        return None
    amounts = graph.constant(node.input[1])
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
    if amounts is None or value is None or float(value) != 0.0 or len(node.input) > 3:
        return None
    sizes = [int(amount) for amount in amounts]
    begins, ends = sizes[: len(sizes) // 2], sizes[len(sizes) // 2 :]
    if len(begins) < 3 or any(begins[:2]) or any(ends[:2]) or min(sizes) < 0:
        return None
    return begins[2:] + ends[2:]


def _pad_more(graph: GraphEditor, conv: NodeProto, border: list[int]) -> None:
    from onnx import helper

    before = graph.attribute(conv, "pads") or [0] * len(border)
    for index, entry in enumerate(conv.attribute):
        if entry.name == "pads":
            del conv.attribute[index]
            break
    pads = [int(a) + b for a, b in zip(before, border, strict=True)]
    conv.attribute.append(helper.make_attribute("pads", pads))
