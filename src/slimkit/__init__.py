"""Slimkit makes trained PyTorch networks smaller and faster, and proves it.

The verbs live at the root and are imported on first use, so that ``import slimkit`` costs
hardly more than ``import torch``::

    import slimkit as sk

    plan = sk.prune.plan(model, example_inputs, macs=0.5)
    sk.apply(model, plan)
    q = sk.quantize.ptq(model, example_inputs, calibration=batches)
    sk.export(q, "model.onnx", example_inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_VERBS = {
    "Inputs": "slimkit.inputs",
    "Plan": "slimkit.plan",
    "SlimkitError": "slimkit.errors",
    "apply": "slimkit.plan",
    "benchmark": "slimkit.measure.latency",
    "build_model": "slimkit.models.building",
    "export": "slimkit.runtime.exporting",
    "load": "slimkit.plan",
    "profile": "slimkit.measure.profiling",
    "save": "slimkit.plan",
}
_ROOMS = ("distill", "errors", "prune", "quantize", "reparam", "search", "sparsify", "train")

__all__ = [
    "Inputs",
    "Plan",
    "SlimkitError",
    "__version__",
    "apply",
    "benchmark",
    "build_model",
    "distill",
    "errors",
    "export",
    "load",
    "profile",
    "prune",
    "quantize",
    "reparam",
    "save",
    "search",
    "sparsify",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        value = getattr(importlib.import_module(_VERBS[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"slimkit.{name}")
    else:
        from slimkit.errors import nearest

        hint = nearest(name, __all__)
        raise AttributeError(f"module 'slimkit' has no attribute {name!r} ({hint})")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from slimkit import distill, errors, prune, quantize, reparam, search, sparsify, train
    from slimkit.errors import SlimkitError
    from slimkit.inputs import Inputs
    from slimkit.measure.latency import benchmark
    from slimkit.measure.profiling import profile
    from slimkit.models.building import build_model
    from slimkit.plan import Plan, apply, load, save
    from slimkit.runtime.exporting import export
