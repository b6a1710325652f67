"""ONNX translations of PyTorch operators that the exporter would take apart clumsily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["adaptive_average_matrix", "emit_adaptive_avg_pool2d"]


def emit_adaptive_avg_pool2d(x: Any, output_size: Sequence[int]) -> Any:
    """``aten::adaptive_avg_pool2d`` as one pooling operator where there is one.

    Without this the exporter goes through strides, which for channels-last inputs ends in a
    chain of index arithmetic. A (1, 1) output is GlobalAveragePool, whole multiples are
    AveragePool, and the rest is a product with one matrix per axis, which is a constant where
    the size of the axis is.
    """
    from onnxscript import opset18 as op

    size = [int(v) for v in output_size]
    if x.shape is not None and len(x.shape) == 4 and size == [1, 1]:
        return op.GlobalAveragePool(x)
    height, width = (v if isinstance(v, int) else None for v in x.shape[-2:])
    if height is not None and width is not None:
        if [height, width] == size:
            return op.Identity(x)
        if len(x.shape) == 4 and height % size[0] == 0 and width % size[1] == 0:
            window = [height // size[0], width // size[1]]
            return op.AveragePool(x, kernel_shape=window, strides=window)
    rows = _averages(x, -2, height, size[0])
    columns = op.Transpose(_averages(x, -1, width, size[1]), perm=[1, 0])
    return op.MatMul(op.MatMul(rows, x), columns)


def _averages(x: Any, axis: int, size: int | None, output_size: int) -> Any:
    """:func:`adaptive_average_matrix`, computed in the graph where the axis has any size."""
    from onnx import numpy_helper
    from onnxscript import opset18

    op: Any = opset18

    def constant(values: Any) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.asarray(values, np.int64)))

    if size is not None:
        matrix = adaptive_average_matrix(size, output_size)
        return op.Constant(value=numpy_helper.from_array(matrix))
    dims = op.Shape(x)
    length = op.Gather(dims, constant(axis), axis=0)
    index = np.arange(output_size)[:, None]
    count = constant(output_size)
    start = op.Div(op.Mul(constant(index), length), count)
    end = op.Div(op.Add(op.Mul(constant(index + 1), length), constant(output_size - 1)), count)
    place = op.Unsqueeze(op.Range(constant(0), length, constant(1)), constant([0]))
    inside = op.And(op.GreaterOrEqual(place, start), op.Less(place, end))
    share = op.Cast(op.Sub(end, start), to=1)
    return op.CastLike(op.Div(op.Cast(inside, to=1), share), x)


def adaptive_average_matrix(size: int, output_size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The (output_size, size) matrix that averages a row adaptively.

    Output i is the mean of inputs from ⌊i·size/output_size⌋ up to ⌈(i+1)·size/output_size⌉.
    """
    matrix = np.zeros((output_size, size), np.float32)
    for i in range(output_size):
        start, end = i * size // output_size, -(-(i + 1) * size // output_size)
        matrix[i, start:end] = 1 / (end - start)
    return matrix
