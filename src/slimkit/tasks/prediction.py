"""``predict.py``: stand-alone snippets that run an exported file, and what the file tells them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PREDICT_ARRAYS", "PREDICT_IMAGES", "model_metadata"]

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


PREDICT_IMAGES = '''\
"""Classify images with the model beside this file:  python predict.py IMAGE [IMAGE …]

Needs numpy, pillow and onnxruntime only. What the model expects is in its own metadata.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def load(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata["slimkit.preprocessing"])
    return session, preprocessing, json.loads(metadata["slimkit.classes"])


def prepare(path, preprocessing):
    """An image file as the model's input, float32 (1, C, H, W)."""
    height, width = preprocessing["size"]
    image = ImageOps.exif_transpose(Image.open(path))
    image = image.convert("L" if preprocessing["channels"] == 1 else "RGB")
    # short side to the size (a little more if the centre is cut out), then the centre
    part = preprocessing.get("crop_fraction", 1.0)
    scale = max(width / part / image.width, height / part / image.height)
    larger = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if larger != image.size:
        image = image.resize(larger, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1)
    pixels = pixels / preprocessing["scale"]
    pixels = (pixels - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)


def main(paths):
    session, preprocessing, classes = load(Path(__file__).with_name("model.onnx"))
    name = session.get_inputs()[0].name
    for path in paths:
        logits = session.run(None, {name: prepare(path, preprocessing)})[0][0]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = np.argsort(-scores)[:3]
        told = "  ".join(f"{classes[index]} {100 * scores[index]:.1f} %" for index in best)
        print(f"{path}: {told}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
'''

PREDICT_ARRAYS = '''\
"""Run the model beside this file on arrays:  python predict.py INPUTS.npz [INPUTS.npz …]

Needs numpy and onnxruntime only. A file holds one array for each input of the model, by its name.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(paths):
    model = str(Path(__file__).with_name("model.onnx"))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    for path in paths:
        with np.load(path) as given:
            outputs = session.run(None, {name: given[name] for name in names})
        for entry, output in zip(session.get_outputs(), outputs):
            print(f"{path}: {entry.name} {json.dumps(output.tolist())}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
'''
