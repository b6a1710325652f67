"""Everything after PyTorch: ONNX files, the runtimes that serve them, proof that they agree."""

from __future__ import annotations

from slimkit.runtime.exporting import ExportResult, export
from slimkit.runtime.fusion import Fusion, fusion_report
from slimkit.runtime.layer_parity import LayersParity, parity_per_layer
from slimkit.runtime.output_parity import Parity, parity
from slimkit.runtime.sessions import Session, TensorSpec, available_backends, open_session
from slimkit.runtime.surroundings import environment

__all__ = [
    "ExportResult",
    "Fusion",
    "LayersParity",
    "Parity",
    "Session",
    "TensorSpec",
    "available_backends",
    "environment",
    "export",
    "fusion_report",
    "open_session",
    "parity",
    "parity_per_layer",
]
