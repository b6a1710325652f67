"""Making an exported ONNX graph small, plain and readable.

The exporter annotates every node and value with stack traces and class names, writes
attributes that only repeat the default, and names values after intermediate representations.
None of that is needed to run the file; of a 272 k-parameter ResNet it is 7 % of the bytes.
What people do read are node names: here they become the module's path (``layer1.0.conv1``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["mean_to_global_pool", "tidy", "value_ranks"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = {"Conv", "ConvInteger", "ConvTranspose", "Gemm", "MatMul", "MatMulInteger", "PRelu"}
_QUANTIZERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_DEFAULT_INTEGERS = {
    ("Conv", "group"): 1,
    ("ConvInteger", "group"): 1,
    ("ConvTranspose", "group"): 1,
    ("Gemm", "transA"): 0,
    ("Gemm", "transB"): 0,
    ("Reshape", "allowzero"): 0,
    ("ReduceMean", "noop_with_empty_axes"): 0,
    ("ReduceMean", "keepdims"): 1,
    ("MaxPool", "ceil_mode"): 0,
    ("MaxPool", "storage_order"): 0,
    ("AveragePool", "ceil_mode"): 0,
    ("AveragePool", "count_include_pad"): 0,
    ("QuantizeLinear", "block_size"): 0,
    ("QuantizeLinear", "saturate"): 1,
    ("QuantizeLinear", "output_dtype"): 0,
    ("DequantizeLinear", "block_size"): 0,
}
_DEFAULT_FLOATS = {("Gemm", "alpha"): 1.0, ("Gemm", "beta"): 1.0}
_WINDOWED = {"Conv", "ConvInteger", "ConvTranspose", "MaxPool", "AveragePool"}


def tidy(model: ModelProto, *, prefix: str = "model.") -> None:
    """Shorten and strip ``model`` in place without changing what it computes.

    Args:
        model: a complete graph; inputs and outputs keep their names.
        prefix: taken off the front of parameter and module paths.
    """
    graph = model.graph
    _rename(graph, prefix)
    _strip(model)
    for node in _nodes(graph):
        _drop_default_attributes(node)


def mean_to_global_pool(model: ModelProto) -> None:
    """Write the mean over both spatial axes of an (N, C, H, W) value as GlobalAveragePool.

    The exporter emits ReduceMean for adaptive average pooling, for which ONNX Runtime has no
    integer kernel.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    ranks = value_ranks(graph)
    for position, node in enumerate(graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        keeps = all(a.i == 1 for a in node.attribute if a.name == "keepdims")
        axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
        if keeps and ranks.get(node.input[0]) == 4 and {a % 4 for a in axes} == {2, 3}:
            pool = helper.make_node(
                "GlobalAveragePool", [node.input[0]], list(node.output), name=node.name
            )
            pool.metadata_props.extend(node.metadata_props)
            graph.node[position].CopyFrom(pool)


def value_ranks(graph: GraphProto) -> dict[str, int]:
    """Number of dimensions of every value whose shape the graph states."""
    stated = [*graph.input, *graph.value_info, *graph.output]
    ranks = {
        info.name: len(info.type.tensor_type.shape.dim)
        for info in stated
        if info.type.tensor_type.HasField("shape")
    }
    ranks.update({item.name: len(item.dims) for item in graph.initializer})
    return ranks


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of nested control-flow graphs included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
            for nested in attribute.graphs:
                yield from _nodes(nested)


def _strip(model: ModelProto) -> None:
    graph = model.graph
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("doc_string")
    graph.ClearField("value_info")
    used = {name for node in _nodes(graph) for name in node.input}
    used.update(output.name for output in graph.output)
    kept = [item for item in graph.initializer if item.name in used]
    if len(kept) < len(graph.initializer):
        copies = [type(item).FromString(item.SerializeToString()) for item in kept]
        graph.ClearField("initializer")
        graph.initializer.extend(copies)
    for item in graph.initializer:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for value in [*graph.input, *graph.output]:
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    for node in _nodes(graph):
        node.ClearField("metadata_props")
        node.ClearField("doc_string")


def _drop_default_attributes(node: NodeProto) -> None:
    def is_default(name: str, value: object) -> bool:
        key = (node.op_type, name)
        if key in _DEFAULT_INTEGERS:
            return value == _DEFAULT_INTEGERS[key]
        if key in _DEFAULT_FLOATS:
            return value == _DEFAULT_FLOATS[key]
        if node.op_type not in _WINDOWED:
            return False
        if name == "auto_pad":
            return value == b"NOTSET"
        if name in ("dilations", "strides"):
            return set(value) == {1} if isinstance(value, list) else False
        return name in ("pads", "output_padding") and isinstance(value, list) and not any(value)

    from onnx import helper

    kept = [a for a in node.attribute if not is_default(a.name, helper.get_attribute_value(a))]
    if len(kept) < len(node.attribute):
        copies = [type(a).FromString(a.SerializeToString()) for a in kept]
        node.ClearField("attribute")
        node.attribute.extend(copies)


def _rename(graph: GraphProto, prefix: str) -> None:
    """Parameters by their path, nodes by their module's path, other values by a number."""
    names = _value_names(graph, prefix)
    name_node = _node_namer(graph, prefix, names)
    for node in graph.node:
        node.name = name_node(node)
        for position, name in enumerate(node.output):
            node.output[position] = names.get(name, name)
    for node in _nodes(graph):
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    for item in graph.initializer:
        item.name = names.get(item.name, item.name)


def _value_names(graph: GraphProto, prefix: str) -> dict[str, str]:
    """Old → new name of every value but the inputs and outputs of the graph."""
    public = {value.name for value in [*graph.input, *graph.output]}
    inner = {name for node in _nodes(graph) for name in node.output} - {
        name for node in graph.node for name in node.output
    }
    taken = public | inner
    names: dict[str, str] = {}
    for item in graph.initializer:
        if item.name not in public:
            names[item.name] = _fresh(_parameter_name(item.name, prefix), taken)
    counter = _counter(taken, "t")
    for node in graph.node:
        for output in node.output:
            if output and output not in public:
                names[output] = counter()
    return names


def _fresh(name: str, taken: set[str]) -> str:
    """``name``, or ``name_2``, ``name_3`` … when it is taken; then it is."""
    candidate, count = name, 2
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def _counter(taken: set[str], letter: str) -> Callable[[], str]:
    state = 0

    def following() -> str:
        nonlocal state
        state += 1
        while f"{letter}{state}" in taken:
            state += 1
        return f"{letter}{state}"

    return following


def _parameter_name(name: str, prefix: str) -> str:
    short = name.removeprefix(prefix)
    if short.endswith(".weight_bias"):  # the exporter's name for a bias made by batch norm folding
        return short.removesuffix("weight_bias") + "bias"
    return "c" + short.removeprefix("val_") if short.startswith("val_") else short


def _node_namer(
    graph: GraphProto, prefix: str, names: dict[str, str]
) -> Callable[[NodeProto], str]:
    """A function node → unique name; empty for Q/DQ and constants, whose neighbours say all."""
    constants = {item.name for item in graph.initializer}
    made_from = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type in ("DequantizeLinear", "Cast", "Mul", "Reshape", "Sub") and node.input
    }
    folded: set[str] = set()  # values that depend on constants only
    for node in graph.node:
        if all(name in constants or name in folded for name in node.input):
            folded.update(node.output)
    taken: set[str] = set()

    def name_node(node: NodeProto) -> str:
        if node.op_type in _QUANTIZERS or (node.input and node.output[0] in folded):
            return ""
        path = ""
        if node.op_type in _WEIGHTED and len(node.input) > 1:
            weight = node.input[1]
            while weight not in constants and weight in made_from:
                weight = made_from[weight]
            if weight in constants:
                stem, _, last = names.get(weight, weight).rpartition(".")
                path = stem if last.startswith("weight") else ""
        if not path:
            scope = _scope(node, prefix)
            path = f"{scope}/{node.op_type}" if scope else node.op_type
        return _fresh(path, taken)

    return name_node


def _scope(node: NodeProto, prefix: str) -> str:
    """Path of the module that issued ``node``, from the exporter's annotation."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return ""
            path = str(scopes[-2]) if len(scopes) > 1 else ""
            return "" if path == prefix.rstrip(".") else path.removeprefix(prefix)
    return ""
