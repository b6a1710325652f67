"""Targets: what a runtime can compute with integers, as data.

A target says which number formats activations and weights have and which torch functions
take part. To support another runtime, or the same one differently, build a
:class:`Target` and pass it as ``target=``, or register it under a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from slimkit.errors import InputError
from slimkit.registry import Registry
from slimkit.runtime.surroundings import saturates_int8_pairs

__all__ = ["TARGETS", "NumberFormat", "Target", "resolve_target"]


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


@dataclass(frozen=True)
class Target:
    """What a runtime computes with integers. Functions are named as in call addresses.

    Attributes:
        name: for messages and plans.
        activation: format of activations; one scale per tensor.
        weight: format of weights; symmetric.
        layers: function with weights → dimension of the weight that holds output channels.
        joins: functions of several activations, each with its own scale.
        pools: functions of one activation whose output gets its own scale.
        same_scale: functions that only move values: their output keeps the input's scale.
        fused: activation functions that are part of the integer operator before them.
        float_outputs: layers whose result may leave as floating point when no integer
            operator reads it, which keeps logits exact.
        sums: how products are added up. ``"int32"``: exactly. ``"int16_pairs"``: two at a time
            in 16 bits, which saturate, as x86 processors without VNNI do; weight scales are then
            made so much larger that no pair can overflow (depthwise convolutions have kernels
            that sum exactly). ``"host"``: as the processor that quantizes, which
            :func:`resolve_target` looks at.
    """

    name: str
    activation: NumberFormat = NumberFormat(8)
    weight: NumberFormat = NumberFormat(8, signed=True, symmetric=True)
    layers: Mapping[str, int] = field(default_factory=_conv_like)
    joins: frozenset[str] = frozenset({"add", "cat", "concat", "mul"})
    pools: frozenset[str] = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "mean"})
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
    fused: frozenset[str] = frozenset({"relu", "relu6", "hardtanh"})
    float_outputs: frozenset[str] = frozenset({"linear"})
    sums: Literal["int32", "int16_pairs", "host"] = "int32"

    @property
    def summary(self) -> str:
        """One line for ``slimkit list``."""
        sums = {
            "int32": "products summed exactly",
            "int16_pairs": "no pair of products beyond 16 bits, for x86 without VNNI",
            "host": "products summed as this processor does",
        }
        return f"{self.activation} activations, {self.weight} weights, {sums[self.sums]}."


TARGETS: Registry[Target] = Registry("quantization target")
"""Name → :class:`Target`."""

for _name in ("onnxruntime", "openvino"):
    TARGETS.register(_name)(Target(_name, sums="host"))
    TARGETS.register(f"{_name}-vnni")(Target(f"{_name}-vnni"))
    TARGETS.register(f"{_name}-avx2")(Target(f"{_name}-avx2", sums="int16_pairs"))


def resolve_target(target: str | Target) -> Target:
    """The target itself, or the registered one of that name, for this processor.

    Returns:
        Its ``sums`` are ``"int32"`` or ``"int16_pairs"``.

    Raises:
        UnknownNameError: with the nearest names.
    """
    found = target if isinstance(target, Target) else TARGETS.get(target, where="target")
    if found.sums != "host":
        return found
    return replace(found, sums="int16_pairs" if saturates_int8_pairs() else "int32")
