"""``predict.py`` beside a variant, and what an exported file says of its own use.

The scripts are modules of this package (``predict_images`` and its like) that import nothing of
it: their text is what is written beside a file, their ``main`` is what ``slimkit predict`` runs.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimkit.errors import ArtifactError

__all__ = ["file_task", "model_metadata", "script_of"]

TASK = "slimkit.task"
PREPROCESSING = "slimkit.preprocessing"
CLASSES = "slimkit.classes"


def model_metadata(
    task: str, preprocessing: Mapping[str, Any], classes: Sequence[str], **more: str
) -> dict[str, str]:
    """What an exported file says about its own use, as ONNX metadata.

    Args:
        task: its type, for whoever reads the file without its recipe.
        preprocessing: ``mean``, ``std``, ``size``, ``channels`` … of the data.
        classes: names in the order of the outputs.
        **more: further entries, filed under ``slimkit.KEY``.
    """
    plain = {key: value for key, value in preprocessing.items() if key != "classes"}
    return {
        TASK: task,
        PREPROCESSING: json.dumps(plain),
        CLASSES: json.dumps(list(classes)),
        **{f"slimkit.{key}": value for key, value in more.items()},
    }


def script_of(module: str) -> str:
    """The text of a script, by its module's name."""
    return Path(str(importlib.import_module(module).__file__)).read_text(encoding="utf-8")


def file_task(path: Path) -> str:
    """The task that an exported file is for, by its metadata.

    Raises:
        ArtifactError: it is no ONNX file, or none of ours.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ArtifactError(f"it cannot be read: {error}", where=str(path)) from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if TASK not in metadata:
        raise ArtifactError(
            "its metadata do not say what it is for",
            where=str(path),
            hint="export it by slimkit run, or by slimkit quantize --task",
        )
    return str(metadata[TASK])
