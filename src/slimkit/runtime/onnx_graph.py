"""A small editor for ONNX graphs: who makes and reads a value, constants, insertions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

__all__ = ["GraphEditor"]

Array = np.ndarray[Any, Any]


class GraphEditor:
    """Edits a graph in memory; :meth:`commit` writes the result back.

    Args:
        graph: the graph to edit; until :meth:`commit` only its nodes' fields change.

    Attributes:
        nodes: the nodes in an order of execution.
    """

    def __init__(self, graph: GraphProto) -> None:
        self._graph = graph
        self.nodes: list[NodeProto] = list(graph.node)
        self._tensors: dict[str, TensorProto] = {item.name: item for item in graph.initializer}
        self._arrays: dict[str, Array] = {}
        self._by_content: dict[tuple[Any, ...], str] = {}
        self._outputs = {value.name for value in graph.output}
        stated = [*graph.input, *graph.value_info, *graph.output]
        self._ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in stated}
        self._names = set(self._tensors) | {value.name for value in stated}
        self._names |= {name for node in self.nodes for name in (*node.input, *node.output)}
        self._numbers: dict[str, int] = {}  # the last that fresh() gave, by prefix
        self._producers: dict[str, NodeProto] = {}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            self.link(node)

    def constant(self, name: str) -> Array | None:
        """The values of an initialiser, ``None`` for anything else."""
        from onnx import numpy_helper

        if name not in self._tensors:
            return None
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self._tensors[name])
        return self._arrays[name]

    def constants(self) -> list[str]:
        """The names of all initialisers."""
        return list(self._tensors)

    def rename_constant(self, old: str, new: str) -> None:
        """Call an initialiser ``new``, unless that name is taken."""
        if new in self._names:
            return
        tensor = self._tensors.pop(old)
        tensor.name = new
        self._tensors[new] = tensor
        self._names.add(new)
        self.redirect(old, new)

    def overwrite(self, name: str, values: Array) -> str:
        """Give the initialiser ``name`` other values, and perhaps another type."""
        from onnx import numpy_helper

        # Not ascontiguousarray: that turns shape () into (1,), which additions do not fuse with.
        self._tensors[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        self._arrays[name] = values
        return name

    def shared(self, values: Array, prefix: str) -> str:
        """The name of an initialiser with these values; equal ones are stored once."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._by_content:
            self._by_content[key] = self.overwrite(self.fresh(prefix), values)
        return self._by_content[key]

    def fresh(self, prefix: str) -> str:
        """A name that is not taken: the prefix and a number."""
        number = self._numbers.get(prefix, 0) + 1
        while f"{prefix}{number}" in self._names:
            number += 1
        self._numbers[prefix] = number
        self._names.add(f"{prefix}{number}")
        return f"{prefix}{number}"

    def producer(self, value: str) -> NodeProto | None:
        """The node that makes ``value``."""
        return self._producers.get(value)

    def consumers(self, value: str) -> list[NodeProto]:
        """The nodes that read ``value``."""
        return [node for node in self._readers.get(value, []) if value in node.input]

    def is_output(self, value: str) -> bool:
        """Whether ``value`` leaves the graph."""
        return value in self._outputs

    def rank(self, value: str) -> int | None:
        """The stated number of dimensions of ``value``."""
        return self._ranks.get(value)

    @staticmethod
    def attribute(node: NodeProto, name: str) -> Any:
        """The value of an attribute, ``None`` when it is not given."""
        from onnx import helper

        for entry in node.attribute:
            if entry.name == name:
                return helper.get_attribute_value(entry)
        return None

    @staticmethod
    def node(
        operator: str,
        inputs: list[str],
        output: str | list[str],
        like: NodeProto,
        **attributes: Any,
    ) -> NodeProto:
        """A new node that keeps the annotations (module path) of ``like``; not yet placed."""
        from onnx import helper

        outputs = [output] if isinstance(output, str) else output
        made = helper.make_node(operator, inputs, outputs, **attributes)
        made.metadata_props.extend(like.metadata_props)
        return made

    def quantization_of(self, value: str) -> list[str] | None:
        """Names of scale and zero point when ``value`` is dequantized with one known scale."""
        node = self.producer(value)
        if node is None or node.op_type != "DequantizeLinear" or len(node.input) < 3:
            return None
        known = self.constant(node.input[1]) is not None and self.attribute(node, "axis") is None
        return list(node.input[1:3]) if known else None

    def replace(self, old: NodeProto, *new: NodeProto) -> None:
        """Put ``new`` where ``old`` is."""
        position = self.position(old)
        self.remove(old)
        self._insert(position, new)

    def insert_after(self, node: NodeProto, *new: NodeProto) -> None:
        """Place ``new`` right after ``node``, whose outputs may have been renamed."""
        self._insert(self.position(node) + 1, new)
        self.link(node)

    def insert_before(self, node: NodeProto, *new: NodeProto) -> None:
        """Place ``new`` right before ``node``."""
        self._insert(self.position(node), new)
        self.link(node)

    def remove(self, node: NodeProto) -> None:
        """Take ``node`` out; its readers must have been redirected."""
        del self.nodes[self.position(node)]
        for name in node.output:
            if self._producers.get(name) is node:
                del self._producers[name]
        for name in node.input:
            self._readers[name] = [n for n in self._readers.get(name, []) if n is not node]

    def redirect(self, old: str, new: str) -> None:
        """Make all readers of ``old`` read ``new``."""
        for node in self.consumers(old):
            for position, name in enumerate(node.input):
                if name == old:
                    node.input[position] = new
            self._readers.setdefault(new, []).append(node)
        self._readers.pop(old, None)

    def commit(self) -> None:
        """Write nodes and the initialisers that are still read back into the graph."""
        used = {name for node in self.nodes for name in node.input} | self._outputs
        nodes = [type(node).FromString(node.SerializeToString()) for node in self.nodes]
        kept = [tensor for name, tensor in self._tensors.items() if name in used]
        tensors = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        self._graph.ClearField("node")
        self._graph.ClearField("initializer")
        self._graph.node.extend(nodes)
        self._graph.initializer.extend(tensors)

    def position(self, node: NodeProto) -> int:
        """Where ``node`` stands among :attr:`nodes`."""
        return next(index for index, item in enumerate(self.nodes) if item is node)

    def _insert(self, position: int, new: Iterable[NodeProto]) -> None:
        for offset, node in enumerate(new):
            self.nodes.insert(position + offset, node)
            self.link(node)

    def link(self, node: NodeProto) -> None:
        """Take note of a node's inputs and outputs after they were changed."""
        for name in node.output:
            self._producers[name] = node
        for name in node.input:
            readers = self._readers.setdefault(name, [])
            if not any(item is node for item in readers):
                readers.append(node)
