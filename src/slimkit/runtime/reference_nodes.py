"""Single nodes of a QDQ file in float64: what every kernel is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from slimkit.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

    Array = NDArray[Any]

__all__ = ["evaluate"]

_CONSTANTS = ("Cast", "ConstantOfShape", "Gather", "Mul", "Sub")


def evaluate(node: NodeProto, arguments: list[Array | None]) -> list[Array]:
    """All outputs of one node in float64 (integers of a QuantizeLinear: int64)."""
    from onnx import helper

    options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    first = arguments[0]
    if first is None:
        raise InputError("a layer without input", where=node.name)
    if node.op_type == "Split" and arguments[1] is not None:
        return np.split(first, np.cumsum(arguments[1])[:-1])
    return [_single(node, first, arguments, options)]


def _single(
    node: NodeProto, first: Array, arguments: list[Array | None], options: Mapping[str, Any]
) -> Array:
    if node.op_type == "DequantizeLinear":
        scale, zero = _aligned(first, arguments, options)
        return np.asarray((first.astype(np.float64) - zero) * scale)
    if node.op_type == "QuantizeLinear":
        scale, zero = _aligned(first, arguments, options)
        kind = np.uint8 if len(arguments) < 3 or arguments[2] is None else arguments[2].dtype
        limits = np.iinfo(kind)
        steps = np.clip(np.rint(first / scale) + zero, limits.min, limits.max)
        return np.asarray(steps, np.int64)
    if node.op_type in _CONSTANTS:
        return _constant(node.op_type, first, arguments[-1], options)
    if node.op_type == "Relu":
        return np.maximum(first, 0)
    if node.op_type == "Clip":
        low, high = [*arguments[1:], None, None][:2]
        return np.asarray(np.clip(first, low, high))
    tensors = [None if a is None else torch.from_numpy(a.astype(np.float64)) for a in arguments]
    result: Array = _layer(node.op_type, tensors, options).numpy()
    return result


def _constant(kind: str, first: Array, last: Array | None, options: Mapping[str, Any]) -> Array:
    """Those that make scales, biases and weights out of what is stored."""
    from onnx import helper

    if kind == "ConstantOfShape":
        return np.zeros(tuple(first), np.int64)
    if kind == "Cast" or last is None:
        return np.asarray(first, helper.tensor_dtype_to_np_dtype(options["to"]))
    if kind == "Sub":
        return np.asarray(first - last)
    return np.asarray(first[last] if kind == "Gather" else first * last)


def _aligned(
    values: Array, arguments: list[Array | None], options: Mapping[str, Any]
) -> tuple[Array, Array]:
    """Scale and zero point in float64, shaped to broadcast along the quantization axis."""
    scale = np.asarray(arguments[1], np.float64)
    given = arguments[2] if len(arguments) > 2 else None
    zero = np.zeros_like(scale) if given is None else np.asarray(given, np.float64)
    if scale.size > 1:
        shape = [1] * values.ndim
        shape[int(options.get("axis", 1))] = -1
        return scale.reshape(shape), zero.reshape(shape)
    return scale.reshape(()), zero.reshape(())


def _layer(
    kind: str, tensors: list[torch.Tensor | None], options: Mapping[str, Any]
) -> torch.Tensor:
    x, weight, bias = [*tensors, None][:3]
    if x is None or weight is None:
        raise InputError("a layer without input or weight", where=kind)
    if kind == "MatMul":
        return torch.matmul(x, weight)
    if kind == "Gemm":
        left = x.T if options.get("transA", 0) else x
        right = weight.T if options.get("transB", 0) else weight
        product: torch.Tensor = options.get("alpha", 1.0) * (left @ right)
        return product if bias is None else product + options.get("beta", 1.0) * bias
    if kind not in ("Conv", "ConvTranspose"):
        raise InputError(f"{kind} has no reference", where=kind)
    spatial = x.ndim - 2
    strides = options.get("strides", [1] * spatial)
    dilations = options.get("dilations", [1] * spatial)
    pads = options.get("pads", [0] * (2 * spatial))
    groups = options.get("group", 1)
    begins, ends = pads[:spatial], pads[spatial:]
    if kind == "Conv":
        padding = [p for pair in zip(begins[::-1], ends[::-1], strict=True) for p in pair]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
        result: torch.Tensor = convolve(
            F.pad(x, padding), weight, bias, strides, 0, dilations, groups
        )
        return result
    extra = options.get("output_padding", [0] * spatial)
    transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    full: torch.Tensor = transpose(x, weight, bias, strides, 0, extra, groups, dilations)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True), start=2):
        full = full.narrow(axis, begin, full.shape[axis] - begin - end)
    return full
