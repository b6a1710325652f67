"""Reference networks, and how a model is named, built and given its weights."""

from __future__ import annotations

from slimkit.models.building import MODELS, build_model, list_models
from slimkit.models.checkpoints import find_checkpoint, load_checkpoint
from slimkit.models.examples import example_input

__all__ = [
    "MODELS",
    "build_model",
    "example_input",
    "find_checkpoint",
    "list_models",
    "load_checkpoint",
]
