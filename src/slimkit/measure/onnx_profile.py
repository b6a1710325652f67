"""Profile of an ONNX file: parameters, MACs, BOPs and bytes per node, from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slimkit.artifact import PathLike
from slimkit.errors import InputError
from slimkit.measure.profiling import LayerCost, Profile
from slimkit.runtime.onnx_files import file_bytes, load_onnx

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["profile_file"]

_WEIGHT_OF = {"QLinearConv": 3, "QLinearMatMul": 3}
"""Where the weight is among the inputs of a node, if not second."""
_CONVOLUTIONS = {"Conv", "ConvInteger", "QLinearConv", "FusedConv"}
_PRODUCTS = {"MatMul", "Gemm", "MatMulInteger", "QLinearMatMul"}
_FLOAT_BITS = 32
Shape = tuple[int, ...]


def profile_file(path: PathLike, sizes: Mapping[str, int] | None = None) -> Profile:
    """Count what an ONNX file computes and holds.

    Convolutions and matrix products are counted, in float or between QuantizeLinear and
    DequantizeLinear; ``bytes`` of the whole is the size of the file and its data.

    Args:
        path: of the file.
        sizes: of its open dimensions by name; a batch is 1 unless it says otherwise.

    Raises:
        ArtifactError: there is no such file, or it is damaged.
        InputError: a dimension is open whose size nobody says.
    """
    import onnx

    model = load_onnx(path, weights=True)
    inputs = _close_dimensions(model, dict(sizes or {}), str(path))
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # of ONNX's own classes, without a common base
        raise InputError(f"its shapes cannot be inferred: {error}", where=str(path)) from error
    counter = _Counter(inferred)
    rows = [row for row in map(counter.row, inferred.graph.node) if row is not None]
    return Profile(
        model=Path(path).name,
        params=sum(row.params for row in rows),
        nonzero_params=sum(row.nonzero_params for row in rows),
        macs=sum(row.macs for row in rows),
        bops=sum(row.bops for row in rows),
        bytes=file_bytes(path),
        layers=tuple(rows),
        input_shapes=tuple(inputs),
    )


class _Counter:
    """Shapes, constants and producers of one graph."""

    def __init__(self, model: ModelProto) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self._read = numpy_helper.to_array
        self.constants = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = node.attribute[0].t
        self.producers = {name: node for node in graph.node for name in node.output}
        self.shapes: dict[str, Shape] = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in [*graph.input, *graph.value_info, *graph.output]
        }
        self.shapes |= {name: tuple(item.dims) for name, item in self.constants.items()}
        self._counted: set[str] = set()

    def row(self, node: NodeProto) -> LayerCost | None:
        """The cost of a node; None of one that neither multiplies nor owns weights."""
        macs = self._macs(node)
        params, nonzero, size = self._owned(node)
        if not macs and not params:
            return None
        weight = _WEIGHT_OF.get(node.op_type, 1)
        bits = self._bits(node.input[0]) * self._bits(node.input[weight]) if macs else 0
        return LayerCost(
            name=node.name or (node.output[0] if node.output else node.op_type),
            type=node.op_type,
            output_shape=self.shapes.get(node.output[0], ()),
            params=params,
            nonzero_params=nonzero,
            macs=macs,
            bops=macs * bits,
            bytes=size,
        )

    def _macs(self, node: NodeProto) -> int:
        if node.op_type in _CONVOLUTIONS:
            kernel = self.shapes.get(node.input[_WEIGHT_OF.get(node.op_type, 1)], ())
            return math.prod(self.shapes.get(node.output[0], (0,))) * math.prod(kernel[1:])
        if node.op_type == "ConvTranspose":
            kernel = self.shapes.get(node.input[1], ())
            return math.prod(self.shapes.get(node.input[0], (0,))) * math.prod(kernel[1:])
        if node.op_type in _PRODUCTS:
            left = self.shapes.get(node.input[0], ())
            turned = any(each.name == "transA" and each.i for each in node.attribute)
            depth = (left[0] if turned else left[-1]) if left else 0
            return math.prod(self.shapes.get(node.output[0], (0,))) * depth
        return 0

    def _owned(self, node: NodeProto) -> tuple[int, int, int]:
        """Elements of its weights and biases, those that are not zero, and their bytes."""
        total = nonzero = size = 0
        for place, name in enumerate(node.input):
            source = self._source(name)
            if place == 0 and node.op_type not in {"Gather", "Gemm", "MatMul"}:
                continue
            if source is None or source in self._counted:
                continue
            array = self._read(self.constants[source])
            if not array.ndim or node.op_type not in _OWNERS:
                continue
            self._counted.add(source)
            total += array.size
            nonzero += int(np.count_nonzero(array))
            size += array.nbytes
        return total, nonzero, size

    def _source(self, name: str) -> str | None:
        """The constant that an input is, perhaps behind DequantizeLinear."""
        node = self.producers.get(name)
        if node is not None and node.op_type in {"DequantizeLinear", "Identity", "Cast"}:
            return self._source(node.input[0])
        return name if name in self.constants else None

    def _bits(self, name: str) -> int:
        """Of what is multiplied: 8 behind DequantizeLinear, else those of its type."""
        node = self.producers.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            source = self.constants.get(node.input[0])
            return self._width(source.data_type) if source is not None else 8
        source = self.constants.get(name)
        return self._width(source.data_type) if source is not None else _FLOAT_BITS

    @staticmethod
    def _width(data_type: int) -> int:
        from onnx import TensorProto

        if data_type in {TensorProto.INT4, TensorProto.UINT4}:
            return 4
        if data_type in {TensorProto.INT8, TensorProto.UINT8}:
            return 8
        half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
        return 16 if data_type in half else _FLOAT_BITS


_OWNERS = frozenset(
    {*_CONVOLUTIONS, *_PRODUCTS, "ConvTranspose", "Gather", "LayerNormalization", "PRelu"}
    | {"BatchNormalization", "InstanceNormalization", "GroupNormalization", "LSTM", "GRU", "RNN"}
    | {"Add", "Mul"}
)
"""Operators whose constants are weights; of others they are shapes, axes and scales."""


def _close_dimensions(model: ModelProto, sizes: dict[str, int], where: str) -> list[Shape]:
    """Give every open dimension of the inputs a size; → the shapes of the inputs."""
    constants = {item.name for item in model.graph.initializer}
    shapes: list[Shape] = []
    for value in model.graph.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        for place, dim in enumerate(dims):
            if dim.dim_value > 0:
                continue
            size = sizes.get(dim.dim_param, 1 if place == 0 else 0)
            if not size:
                raise InputError(
                    f"the size of its dimension {dim.dim_param or place!r} is open",
                    where=f"{where}: {value.name}",
                    hint=f"--size {dim.dim_param or 'NAME'}=224",
                )
            dim.dim_value = size
        shapes.append(tuple(dim.dim_value for dim in dims))
    del model.graph.value_info[:]
    for value in model.graph.output:  # what is said of them may contradict the sizes
        value.type.tensor_type.ClearField("shape")
    return shapes
