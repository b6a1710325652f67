"""Targets: what a runtime can compute with integers, as data.

A target says which number formats activations and weights have, which torch functions take part,
which values share a scale, and what may be asked of it. To support another runtime, or the same
one differently, build a :class:`Target` and pass it as ``target=``, or register it under a name.
ONNX Runtime and OpenVINO are installed and tested here, fused operators included; TensorRT, LiteRT
and XNNPACK are held to what their documentation asks of a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.registry import Registry
from slimkit.runtime.surroundings import saturates_int8_pairs

__all__ = ["TARGETS", "Granularity", "Mode", "NumberFormat", "Target", "resolve_target"]

Mode = Literal["static", "dynamic", "weights"]
"""Scales of activations from calibration, from each batch, or no integer activations at all."""
Granularity = Literal["channel", "tensor", "group"]
"""One weight scale per output channel, per tensor, or per group of inputs of a channel."""


@door
@dataclass(frozen=True)
class NumberFormat:
    """How real numbers are stored as integers.

    Attributes:
        bits: 2 to 8.
        signed: −2^(bits−1) … against 0 … 2^bits − 1.
        symmetric: the zero point is fixed: 0 for signed integers, which then leave out the
            most negative value so that −x is stored as well as x.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"{self.bits} bits are not supported", where="bits", hint="2 to 8")

    def __str__(self) -> str:
        kind = f"{'int' if self.signed else 'uint'}{self.bits}"
        return f"{'symmetric' if self.symmetric else 'asymmetric'} {kind}"

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        return int(self.symmetric) - (1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def _conv_like() -> Mapping[str, int]:
    return {"conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0}


def _lookups_and_transposed() -> Mapping[str, int]:
    transposed = {f"conv_transpose{rank}d": 1 for rank in (1, 2, 3)}
    return {**transposed, "embedding": 0}


@door
@dataclass(frozen=True)
class Target:
    """What a runtime computes with integers. Functions are named as in call addresses.

    Attributes:
        name: for messages and plans.
        activation: format of activations; one scale per tensor.
        weight: format of weights; signed and symmetric.
        zero_points: bits, up to 4, of those weights that have a zero point for each scale. It is
            stored beside it and taken off when the file is loaded: the kernels see int8.
        layers: function with weights → dimension of the weight that holds output channels.
        stored: functions that compute in float but whose weights are kept as integers →
            dimension of the weight that has one scale per entry.
        dynamic: those ``layers`` that are integer with ``mode="dynamic"``; the others then only
            keep their weights as integers.
        joins: functions of several activations, each with its own scale.
        products: products of two activations, such as the scores of an attention.
        pools: functions of one activation whose output gets its own scale.
        activations: activation functions that the runtime computes from integers to integers:
            ``hardsigmoid``, ``hardswish``, ``leaky_relu``, ``sigmoid``, ``silu``.
        same_scale: functions that only move values: their output keeps the input's scale. ``pad``
            is one of them where it pads with zeros or copies.
        shared: functions whose inputs and output must have one scale, made from all of their
            ranges: names out of ``joins`` and ``pools``.
        fused: activation functions that are part of the integer operator before them.
        float_outputs: layers whose result may leave as floating point when no integer
            operator reads it, which keeps logits exact.
        one_sided: joins that are added inside the layer that makes one input: that input is
            not rounded, the other one is.
        sums: how products are added up. ``"int32"``: exactly. ``"int16_pairs"``: two at a time
            in 16 bits, which saturate, as x86 processors without VNNI do; weight scales are then
            made so much larger that no pair can overflow (depthwise convolutions have kernels
            that sum exactly). ``"host"``: as the processor that quantizes, which
            :func:`resolve_target` looks at.
        biases: ``"int32"`` on the scale of the sums, or ``"float"``.
        compact: scales of weights are powers of 2^(1/16), so that the file needs a byte for each,
            and biases are 16-bit floats in the file, of which the runtime makes int32 when it loads
            it: 3 bytes per channel instead of 8.
        modes: what ``mode=`` may be.
        granularities: what ``granularity=`` may be.
        group_sizes: what ``group_size=`` may be.
        weight_bits: what ``weight_bits=`` may be.
        opset: the oldest ONNX operator set that its files may have.
    """

    name: str
    activation: NumberFormat = NumberFormat(8)
    weight: NumberFormat = NumberFormat(8, signed=True, symmetric=True)
    zero_points: frozenset[int] = frozenset()
    layers: Mapping[str, int] = field(default_factory=_conv_like)
    stored: Mapping[str, int] = field(default_factory=_lookups_and_transposed)
    dynamic: frozenset[str] = frozenset({"linear"})
    joins: frozenset[str] = frozenset({"add", "cat", "concat", "mul"})
    products: frozenset[str] = frozenset()
    pools: frozenset[str] = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "mean"})
    activations: frozenset[str] = frozenset()
    same_scale: frozenset[str] = frozenset(
        {
            "channel_shuffle",
            "chunk",
            "contiguous",
            "dropout",
            "flatten",
            "getitem",
            "max_pool1d",
            "max_pool2d",
            "pad",
            "permute",
            "pixel_shuffle",
            "reshape",
            "split",
            "squeeze",
            "tensor_split",
            "transpose",
            "unflatten",
            "unsqueeze",
            "view",
        }
    )
    shared: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset({"relu", "relu6", "hardtanh"})
    float_outputs: frozenset[str] = frozenset({"linear"})
    one_sided: frozenset[str] = frozenset()
    sums: Literal["int32", "int16_pairs", "host"] = "int32"
    biases: Literal["int32", "float"] = "int32"
    compact: bool = False
    modes: frozenset[str] = frozenset(get_args(Mode))
    granularities: frozenset[str] = frozenset(get_args(Granularity))
    group_sizes: frozenset[int] = frozenset({16, 32, 64, 128, 256})
    weight_bits: frozenset[int] = frozenset(range(2, 9))
    opset: int = 18

    def __post_init__(self) -> None:
        if not (self.weight.signed and self.weight.symmetric):
            raise InputError(f"weights cannot be {self.weight}", where="weight", hint="symmetric")
        wide = sorted(bits for bits in self.zero_points if bits > _PACKED)
        if wide:
            raise InputError(
                f"{wide[0]}-bit weights cannot have zero points",
                where="zero_points",
                hint=f"those of up to {_PACKED} bits can",
            )
        unknown = sorted(self.activations - _ACTIVATIONS)
        if unknown:
            raise InputError(
                f"no integer arithmetic is known for {', '.join(unknown)}",
                where="activations",
                hint=f"of {', '.join(sorted(_ACTIVATIONS))}",
            )

    def weight_format(self, bits: int) -> NumberFormat:
        """Of weights with so many bits."""
        return replace(self.weight, bits=bits, symmetric=bits not in self.zero_points)

    @property
    def summary(self) -> str:
        """One line for ``slimkit list``."""
        sums = {
            "int32": "products summed exactly",
            "int16_pairs": "no pair of products beyond 16 bits, for x86 without VNNI",
            "host": "products summed as this processor does",
        }
        return f"{self.activation} activations, {self.weight} weights, {sums[self.sums]}."


_PACKED = 4
"""Bits up to which a file holds weights in a type of their own, two to a byte."""
_ACTIVATIONS = frozenset({"hardsigmoid", "hardswish", "leaky_relu", "sigmoid", "silu"})

TARGETS: Registry[Target] = Registry("quantization target")
"""Name → :class:`Target`."""

_CLAMPS = frozenset({"relu", "relu6", "hardtanh"})
_MOVES = Target("moves").same_scale

# Activation functions: what ONNX Runtime 1.32 turns into table lookups and QLinearMul.
_ONNXRUNTIME = Target(
    "onnxruntime",
    activations=frozenset({"hardsigmoid", "hardswish", "leaky_relu", "sigmoid", "silu"}),
    sums="host",
    compact=True,
    zero_points=frozenset({2, 3, 4}),
)
# Its CPU plugin (oneDNN) computes any element-wise function behind a convolution before it rounds.
_OPENVINO = Target(
    "openvino",
    fused=_CLAMPS | {"hardsigmoid", "hardswish", "leaky_relu", "sigmoid", "silu", "gelu"},
    sums="host",
    compact=True,
    zero_points=frozenset({2, 3, 4}),
)

for _target in (_ONNXRUNTIME, _OPENVINO):
    _name = _target.name
    TARGETS.register(_name)(_target)
    TARGETS.register(f"{_name}-vnni")(replace(_target, name=f"{_name}-vnni", sums="int32"))
    TARGETS.register(f"{_name}-avx2")(replace(_target, name=f"{_name}-avx2", sums="int16_pairs"))

# Plain QDQ: what every reader of the format understands, nothing fused but clamps.
TARGETS.register("generic")(Target("generic", products=frozenset({"matmul", "bmm"}), fused=_CLAMPS))

# "Working with quantized types" in NVIDIA's documentation: symmetric int8 everywhere; quantize the
# inputs of weighted operators and not their outputs; the sum of a residual block is computed by
# the convolution before it when only the other branch is quantized; biases stay in float.
_SYMMETRIC = NumberFormat(8, signed=True, symmetric=True)
_TRANSPOSED = {f"conv_transpose{rank}d": 1 for rank in (2, 3)}
_TENSORRT = Target(
    "tensorrt",
    activation=_SYMMETRIC,
    layers={"conv1d": 0, "conv2d": 0, "conv3d": 0, "linear": 0, **_TRANSPOSED},
    stored={},
    joins=frozenset({"add"}),
    products=frozenset({"matmul", "bmm"}),
    float_outputs=frozenset({"conv1d", "conv2d", "conv3d", "linear", *_TRANSPOSED}),
    one_sided=frozenset({"add"}),
    biases="float",
    modes=frozenset({"static"}),
    granularities=frozenset({"channel", "tensor"}),
    weight_bits=frozenset({8}),
)
TARGETS.register("tensorrt")(_TENSORRT)

# The quantization specification of LiteRT (TensorFlow Lite): int8 with a zero point, concatenation
# and pooling keep one scale, the logistic function ends on the grid of 1/256.
_SIGNED = NumberFormat(8, signed=True)
_LITERT = Target(
    "litert",
    activation=_SIGNED,
    activations=frozenset({"leaky_relu", "sigmoid"}),
    shared=frozenset({"cat", "concat", "avg_pool2d", "adaptive_avg_pool2d"}),
    same_scale=_MOVES,
    float_outputs=frozenset(),
    granularities=frozenset({"channel", "tensor"}),
    weight_bits=frozenset({4, 8}),
)
TARGETS.register("litert")(_LITERT)
TARGETS.register("xnnpack")(
    replace(
        _LITERT,
        name="xnnpack",
        activations=frozenset({"hardswish", "leaky_relu", "sigmoid"}),
        granularities=frozenset({"channel", "tensor", "group"}),
        group_sizes=frozenset({32, 64, 128}),
    )
)


def resolve_target(target: str | Target) -> Target:
    """The target itself, or the registered one of that name, for this processor.

    Returns:
        Its ``sums`` are ``"int32"`` or ``"int16_pairs"``.

    Raises:
        UnknownNameError: with the nearest names.
    """
    found = target if isinstance(target, Target) else TARGETS.get(target, where="target")
    if not isinstance(found, Target):
        raise InputError(f"expected a Target, got {type(found).__name__}", where="target")
    if found.sums != "host":
        return found
    return replace(found, sums="int16_pairs" if saturates_int8_pairs() else "int32")
