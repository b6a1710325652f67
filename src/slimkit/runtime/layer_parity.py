"""Integer kernels one by one: each quantized layer of a QDQ file against exact arithmetic.

End to end, a rounding that goes the other way in one layer changes the inputs of all that
follow. So every convolution and matrix product is cut out with its dequantize and quantize
nodes, fed the integers that really reach it, and compared with the same arithmetic in
float64, in units of its output scale.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.outside import iterated
from slimkit.runtime.fusion import INTEGER_CONVS, INTEGER_LINEARS, fusion_report
from slimkit.runtime.onnx_files import load_onnx, write_onnx
from slimkit.runtime.reference_nodes import evaluate
from slimkit.runtime.sessions import Session, open_session
from slimkit.runtime.structure import batch_inputs, named_feeds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto

    Array = NDArray[Any]

__all__ = ["LayerParity", "LayersParity", "parity_per_layer"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip")
_WANTED = 0.9999


@dataclass(frozen=True)
class LayerParity:
    """One layer on equal integer inputs.

    Attributes:
        name: its module path.
        type: its operator.
        elements: outputs that were compared.
        exact: fraction of them that is equal.
        within_one: fraction that differs by at most one step of the output scale.
        max_steps: largest difference in steps.
        integer: whether the runtime used an integer kernel.
    """

    name: str
    type: str
    elements: int
    exact: float
    within_one: float
    max_steps: int
    integer: bool


@dataclass(frozen=True)
class LayersParity:
    """All layers whose inputs and output are quantized.

    A layer whose output stays in floating point (usually the classifier) has no step to
    count in and is not listed.
    """

    layers: tuple[LayerParity, ...]

    @property
    def within_one(self) -> float:
        """The fraction of the worst layer; 1.0 when there are no layers."""
        return min((layer.within_one for layer in self.layers), default=1.0)

    @property
    def exact(self) -> float:
        """Fraction of all outputs that is equal."""
        elements = sum(layer.elements for layer in self.layers)
        equal = sum(layer.exact * layer.elements for layer in self.layers)
        return equal / elements if elements else 1.0

    def problems(self) -> list[str]:
        """Layers with fewer than 99.99 % of outputs within one step, one sentence each."""
        return [
            f"{layer.name}: {layer.within_one:.3%} within one step, wanted {_WANTED:.2%}"
            for layer in self.layers
            if layer.within_one < _WANTED
        ]

    def to_json(self) -> dict[str, Any]:
        """Totals and every layer."""
        layers = [asdict(layer) for layer in self.layers]
        return {"within_one": self.within_one, "exact": self.exact, "layers": layers}

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} integer layers on equal inputs: {self.exact:.3%} equal, "
            f"worst layer {self.within_one:.3%} within one step"
        )


@door
def parity_per_layer(path: PathLike, batches: Iterable[Any], *, threads: int = 1) -> LayersParity:
    """Compare ONNX Runtime's kernel for every quantized layer with exact arithmetic.

    Args:
        path: a QDQ file.
        batches: as in :func:`slimkit.runtime.output_parity.parity`; a few dozen images are enough.
        threads: threads within one operator.

    Returns:
        Empty for a file without quantized layers.

    Raises:
        InputError: there are no batches.
        ArtifactError, BackendError: as :func:`slimkit.runtime.sessions.open_session`.
    """
    model = load_onnx(path, weights=True)
    groups = _quantized_groups(model.graph)
    with tempfile.TemporaryDirectory() as folder:
        needed = list(dict.fromkeys(value for group in groups for value in group.inputs))
        probe = _open(_with_outputs(model, needed, groups), Path(folder) / "probe.onnx", threads)
        runs: list[_LayerRun] = []
        seen = False
        for batch in iterated(batches, where="batches"):
            inputs = batch_inputs(batch, len(probe.inputs))
            results = probe.run(named_feeds(inputs, probe.input_names))
            values = dict(zip(probe.output_names, results, strict=True))
            if not seen:
                runs = [_LayerRun(group, model, values, Path(folder), threads) for group in groups]
                seen = True
            for run in runs:
                run.add(values)
    if not seen:
        raise InputError("there are no batches to compare on", where="batches")
    return LayersParity(tuple(run.result() for run in runs))


@dataclass(frozen=True)
class _Group:
    """DequantizeLinear nodes, what they are made from → layer → (activation) → QuantizeLinear."""

    nodes: tuple[NodeProto, ...]
    layer: NodeProto
    inputs: tuple[str, ...]  # integer values that depend on the network's input
    output: str


def _quantized_groups(graph: GraphProto) -> list[_Group]:
    producers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {item.name for item in graph.initializer}
    groups = []
    for node in graph.node:
        if node.op_type not in _LAYERS:
            continue
        sources = _sources(node, producers, constants)
        tail = _tail(node, readers)
        if sources is not None and tail is not None:
            made = {name for source in sources for name in source.output}
            dequantized = [dq.input[0] for dq in sources if dq.op_type == "DequantizeLinear"]
            dynamic = tuple(name for name in dequantized if name not in constants | made)
            chain = (*sources, node, *tail)
            groups.append(_Group(chain, node, tuple(dict.fromkeys(dynamic)), tail[-1].output[0]))
    return groups


def _sources(
    node: NodeProto, producers: Mapping[str, NodeProto], constants: set[str]
) -> list[NodeProto] | None:
    """The DequantizeLinear before every input but a constant bias; None if one is missing.

    In front of each are the nodes that make its constants.
    """
    found: list[NodeProto] = []
    for position, name in enumerate(node.input):
        before = producers.get(name)
        if before is not None and before.op_type == "DequantizeLinear":
            for needed in before.input:
                found += _makers(needed, producers, constants) or []
            found.append(before)
            continue
        made = _makers(name, producers, constants) if name else []
        if position < 2 or made is None:
            return None
        found += made
    return found


def _makers(
    value: str, producers: Mapping[str, NodeProto], constants: set[str]
) -> list[NodeProto] | None:
    """The nodes that make ``value`` from constants alone, in order; None if it depends on more."""
    if value in constants:
        return []
    node = producers.get(value)
    if node is None or not node.input:
        return None
    made: list[NodeProto] = []
    for name in node.input:
        before = _makers(name, producers, constants)
        if before is None:
            return None
        made += before
    return [*made, node]


def _tail(node: NodeProto, readers: Mapping[str, list[NodeProto]]) -> list[NodeProto] | None:
    """Activation, if any, and QuantizeLinear; None when something else reads the result."""
    tail: list[NodeProto] = []
    current = node
    while current.op_type != "QuantizeLinear":
        after = readers.get(current.output[0], [])
        if len(after) != 1 or len(tail) > 1:
            return None
        current = after[0]
        if current.op_type not in (*_ACTIVATIONS, "QuantizeLinear"):
            return None
        tail.append(current)
    return tail


def _open(model: ModelProto, path: Path, threads: int) -> Session:
    write_onnx(model, path)
    return open_session(path, threads=threads)


def _with_outputs(model: ModelProto, names: list[str], groups: list[_Group]) -> ModelProto:
    """A copy of ``model`` whose outputs are the integer values ``names``."""
    from onnx import ModelProto, helper

    kinds = {name: _integer_type(group, name, model) for group in groups for name in group.inputs}
    copy = ModelProto()
    copy.CopyFrom(model)
    given = {value.name for value in model.graph.input}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, kinds[name], None)
        for name in names
        if name not in given and name not in {value.name for value in model.graph.output}
    )
    return copy


def _integer_type(group: _Group, name: str, model: ModelProto) -> int:
    """Element type of an integer value: that of the zero point that dequantizes it."""
    import onnx

    kinds = {item.name: item.data_type for item in model.graph.initializer}
    for node in group.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] == name and len(node.input) > 2:
            return int(kinds[node.input[2]])
    return int(onnx.TensorProto.UINT8)


class _LayerRun:
    """One layer alone in a file, and its reference.

    Args:
        group: the layer and what quantizes it.
        model: the whole file.
        values: integer values of one batch; their ranks are those of the layer's inputs.
        folder: for the layer's file.
        threads: for its session.
    """

    def __init__(
        self,
        group: _Group,
        model: ModelProto,
        values: Mapping[str, Array],
        folder: Path,
        threads: int,
    ) -> None:
        from onnx import helper, numpy_helper

        self._group = group
        used = {name for node in group.nodes for name in node.input}
        kept = [item for item in model.graph.initializer if item.name in used]
        self._constants = {item.name: numpy_helper.to_array(item) for item in kept}
        inputs = [
            helper.make_tensor_value_info(
                name,
                _integer_type(group, name, model),
                [f"{name}_{axis}" for axis in range(values[name].ndim)],
            )
            for name in group.inputs
        ]
        output = helper.make_tensor_value_info(group.output, self._output_type(kept), None)
        graph = helper.make_graph(
            list({id(node): node for node in group.nodes}.values()),
            "layer",
            inputs,
            [output],
            kept,
        )
        alone = helper.make_model(
            graph, opset_imports=model.opset_import, ir_version=model.ir_version
        )
        path = folder / "layer.onnx"
        self._session = _open(alone, path, threads)
        operators = fusion_report(path).operators
        self._integer = bool((INTEGER_CONVS | INTEGER_LINEARS) & operators.keys())
        self._elements = self._exact = self._near = self._worst = 0

    def _output_type(self, constants: list[Any]) -> int:
        import onnx

        kinds = {item.name: item.data_type for item in constants}
        quantize = self._group.nodes[-1]
        return int(kinds[quantize.input[2]] if len(quantize.input) > 2 else onnx.TensorProto.UINT8)

    def add(self, values: Mapping[str, Array]) -> None:
        """Compare on the integers of one batch."""
        inputs = {name: values[name] for name in self._group.inputs}
        got = self._session.run(inputs)[0].astype(np.int64)
        steps = np.abs(got - self._reference(inputs))
        self._elements += steps.size
        self._exact += int((steps == 0).sum())
        self._near += int((steps <= 1).sum())
        self._worst = max(self._worst, int(steps.max(initial=0)))

    def _reference(self, inputs: Mapping[str, Array]) -> Array:
        values: dict[str, Array] = {**self._constants, **inputs}
        for node in self._group.nodes:
            arguments = [values[name] if name else None for name in node.input]
            values.update(zip(node.output, evaluate(node, arguments), strict=True))
        return values[self._group.output]

    def result(self) -> LayerParity:
        total = max(self._elements, 1)
        return LayerParity(
            name=self._group.layer.name,
            type=self._group.layer.op_type,
            elements=self._elements,
            exact=self._exact / total,
            within_one=self._near / total,
            max_steps=self._worst,
            integer=self._integer,
        )
