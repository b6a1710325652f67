"""Does the runtime really compute in integers? Read off the graph that it runs.

A QDQ file only *allows* integer kernels. ONNX Runtime replaces dequantize → operator →
quantize by one integer operator where its rules match, and computes in floating point
everywhere else, without a word. This module counts both in ONNX Runtime's optimised graph.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.runtime.onnx_files import load_onnx
from slimkit.runtime.onnx_graph import GraphEditor
from slimkit.runtime.sessions import open_session

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

__all__ = [
    "INTEGER_CONVS",
    "INTEGER_LINEARS",
    "FloatNode",
    "Fusion",
    "fusion_report",
    "origin",
]

_CONVS = {"Conv", "FusedConv", "ConvTranspose"}
INTEGER_CONVS = {"QLinearConv", "ConvInteger", "QLinearConvTranspose"}
_LINEARS = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "TransposeMatMul", "MatMulNBits"}
INTEGER_LINEARS = {
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
_MOVES = {  # these only move or choose values: integers pass through them as they are
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Pad",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "ReorderInput",
    "ReorderOutput",
    "Shape",
    "Cast",
    "Constant",
}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class FloatNode:
    """An operator that runs in floating point: its name (module path) and type."""

    name: str
    type: str


@dataclass(frozen=True)
class Fusion:
    """Which operators of a file run as integers.

    Attributes:
        convs: convolutions in the file; ``integer_convs`` of them run as integers.
        integer_convs: see ``convs``.
        linears: matrix products (Gemm, MatMul).
        integer_linears: see ``linears``.
        adds: additions of two computed values (a residual sum, not a bias).
        integer_adds: see ``adds``.
        float_nodes: everything that computes in floating point, moves of data excepted.
        quantizers: Q and DQ nodes left in the graph that runs; each costs a pass over memory.
        operators: type → count in the graph that runs.
    """

    convs: int
    integer_convs: int
    linears: int
    integer_linears: int
    adds: int
    integer_adds: int
    float_nodes: tuple[FloatNode, ...] = ()
    quantizers: int = 0
    operators: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every convolution, matrix product and residual sum runs as integers."""
        return (
            self.integer_convs >= self.convs
            and self.integer_linears >= self.linears
            and self.integer_adds >= self.adds
        )

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**asdict(self), "float_nodes": [asdict(node) for node in self.float_nodes]}

    def __str__(self) -> str:
        text = (
            f"integer: {self.integer_convs}/{self.convs} convolutions, "
            f"{self.integer_linears}/{self.linears} matrix products, "
            f"{self.integer_adds}/{self.adds} sums"
        )
        if not self.float_nodes:
            return text
        names = [f"{node.name or '?'} ({node.type})" for node in self.float_nodes[:6]]
        more = len(self.float_nodes) - len(names)
        return f"{text}; float: {', '.join(names)}" + (f" and {more} more" if more else "")


@door
def fusion_report(path: PathLike) -> Fusion:
    """Count what ONNX Runtime runs as integers on this CPU.

    Args:
        path: an ONNX file, with Q/DQ nodes or without.

    Raises:
        ArtifactError, BackendError: as :func:`slimkit.runtime.sessions.open_session`.
    """
    source = load_onnx(path).graph
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized_path=optimized)
        running = load_onnx(optimized).graph
    wanted = Counter(_kind(node, _computed_values(source)) for node in source.node)
    operators = Counter(node.op_type for node in running.node)
    return Fusion(
        convs=wanted["conv"],
        integer_convs=_total(operators, INTEGER_CONVS),
        linears=wanted["linear"],
        integer_linears=_total(operators, INTEGER_LINEARS),
        adds=wanted["add"],
        integer_adds=operators["QLinearAdd"],
        float_nodes=_float_nodes(source, running),
        quantizers=_total(operators, _QUANTIZERS),
        operators=dict(sorted(operators.items())),
    )


def _total(counts: Counter[str], types: Iterable[str]) -> int:
    return sum(counts[name] for name in types)


def _computed_values(graph: GraphProto) -> set[str]:
    """Names of values that depend on the input of the network."""
    computed = {value.name for value in graph.input} - {item.name for item in graph.initializer}
    for node in graph.node:
        if any(name in computed for name in node.input):
            computed.update(node.output)
    return computed


def _kind(node: NodeProto, computed: set[str]) -> str:
    if node.op_type in _CONVS | {"ConvInteger"}:
        return "conv"
    if node.op_type in _LINEARS | {"MatMulInteger"}:
        return "linear"
    if node.op_type == "Add" and all(name in computed for name in node.input):
        return "add"
    return "other"


def _float_nodes(source: GraphProto, running: GraphProto) -> tuple[FloatNode, ...]:
    """Nodes of the running graph that compute on floats, by the names of the file."""
    floats = _float_values(running)
    producers = {output: node for node in source.node for output in node.output}
    known = {node.name for node in source.node}
    found = []
    for node in running.node:
        if node.op_type in _QUANTIZERS | _MOVES | INTEGER_CONVS | INTEGER_LINEARS:
            continue
        if any(name in floats for name in node.input) and any(n in floats for n in node.output):
            name = node.name if node.name in known else origin(node, producers)
            found.append(FloatNode(name, node.op_type))
    return tuple(found)


def origin(node: NodeProto, producers: Mapping[str, NodeProto]) -> str:
    """The name in the file of what a node of the running graph was fused from.

    A fused node keeps the last of its members' output names; from there it is a step or two
    back (over the activation, the sum) to the operator that gave it its type.
    """
    matching = _CONVS if node.op_type in _CONVS else _LINEARS & {node.op_type}
    candidates = [name.removesuffix("_nchwc") for name in (*node.output, node.name)]
    current = last = next((producers[n] for n in candidates if n in producers), None)
    for _ in range(4):
        if current is None:
            break
        if not matching or current.op_type in matching:
            return str(current.name)
        before = [producers[name] for name in current.input if name in producers]
        current = next((n for n in before if n.op_type in matching), before[0] if before else None)
    return str(last.name) if last is not None else str(node.name)


def _float_values(graph: GraphProto) -> set[str]:
    """Computed values of floating-point type, by propagation from inputs and DQ nodes."""
    import onnx

    kinds = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE}
    floats = {v.name for v in graph.input if v.type.tensor_type.elem_type in kinds}
    for node in graph.node:
        name = node.op_type
        if name in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
            floats.update(node.output)
        elif name == "Cast":
            if GraphEditor.attribute(node, "to") in kinds:
                floats.update(node.output)
        elif name in ("QuantizeLinear", "Shape") or name.startswith("QLinear"):
            continue
        elif name == "QGemm":  # with 9 inputs it returns integers, with fewer floats
            if len(node.input) < 9 or not node.input[7]:
                floats.update(node.output)
        elif any(value in floats for value in node.input):
            floats.update(node.output)
    return floats
