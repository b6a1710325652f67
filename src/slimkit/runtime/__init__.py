"""Everything after PyTorch: ONNX files, the runtimes that serve them, proof that they agree."""

from __future__ import annotations

from slimkit.runtime.exporting import ExportResult, export
from slimkit.runtime.sessions import Session, TensorSpec, available_backends, open_session

__all__ = [
    "ExportResult",
    "Session",
    "TensorSpec",
    "available_backends",
    "export",
    "open_session",
]
