"""Where a room adds to the ONNX export without the exporter knowing of it.

Two small tables: :data:`TRANSLATIONS` says how a custom operator is written in ONNX, and
:data:`GRAPH_PASSES` holds rewrites of the exported graph. :func:`slimkit.runtime.exporting.export`
reads both; quantization, for example, adds its fake-quantize operator to the first and the
rounding of weights to int8 initialisers to the second. What a pass has to know of the model, the
model's method ``export_hints()`` returns as a mapping of strings; the pass finds it among the
file's metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from slimkit.registry import Registry

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = [
    "BIASES_HINT",
    "GRAPH_PASSES",
    "OPSET_HINT",
    "SCALES_HINT",
    "TRANSLATIONS",
    "GraphPass",
    "graph_pass",
    "translation_table",
]

BIASES_HINT = "slimkit.biases"
"""Export hint: biases between integers are ``"int32"`` (default), ``"float16"`` or ``"float"``."""
OPSET_HINT = "slimkit.opset"
"""Export hint: the oldest operator set that the target reads."""
SCALES_HINT = "slimkit.scales"
"""Export hint: scales of weights may be ``"bytes"`` that a table is looked up with."""

GraphPass = Callable[["ModelProto"], None]
"""Changes the model in place. Shapes of all values (``value_info``) are still there."""

TRANSLATIONS: Registry[Callable[..., Any]] = Registry("ONNX translation")
"""Torch operator (``"slimkit::fake_quantize"`` or ``"slimkit::op.overload"``) → the function,
written with onnxscript, that emits it. Register lazily: onnxscript is only for exports."""

GRAPH_PASSES: Registry[GraphPass] = Registry("ONNX graph pass")
"""Name → pass; run in the order of their names, after constants are folded and batch norms are
merged into convolutions, before names and annotations are tidied away."""


def graph_pass(name: str) -> Callable[[GraphPass], GraphPass]:
    """A decorator: ``@graph_pass("10_weights_to_int8")``."""
    return GRAPH_PASSES.register(name)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of those operators that exist in this process.

    An operator whose defining module was never imported cannot be in a model either.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in TRANSLATIONS:
        namespace, _, operator = name.partition("::")
        operator, _, overload = operator.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            table[getattr(packet, overload or "default")] = TRANSLATIONS.get(name)
    return table


TRANSLATIONS.register_lazy(
    "aten::adaptive_avg_pool2d", "slimkit.runtime.translations:emit_adaptive_avg_pool2d"
)
