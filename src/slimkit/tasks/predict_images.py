"""Classify images with the model beside this file.

    python predict.py IMAGE [IMAGE …]

Needs numpy, pillow and onnxruntime only. What the model expects is in its own metadata.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

__all__ = ["load", "main", "prepare"]


def load(path: Path) -> tuple[Any, Any, Any]:
    """The session, and what the file says of preprocessing and classes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata["slimkit.preprocessing"])
    return session, preprocessing, json.loads(metadata["slimkit.classes"])


def prepare(path: Path, preprocessing: dict[str, Any]) -> Any:
    """An image file as the model's input, float32 (1, C, H, W)."""
    height, width = preprocessing["size"]
    image: Any = ImageOps.exif_transpose(Image.open(path))
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


def main(arguments: Sequence[str] | None = None, model: Path | None = None) -> None:
    """Command line; ``model`` is the file to run, by default the one beside this."""
    parser = argparse.ArgumentParser(prog="predict", description="Classify images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    chosen = parser.parse_args(arguments)
    session, preprocessing, classes = load(model or Path(__file__).with_name("model.onnx"))
    name = session.get_inputs()[0].name
    for path in chosen.images:
        try:
            pixels = prepare(path, preprocessing)
        except OSError as error:
            sys.exit(f"{path}: {error}")
        logits = session.run(None, {name: pixels})[0][0]
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = np.argsort(-scores)[:3]
        names = {index: classes[index] if classes else f"class {index}" for index in best}
        told = "  ".join(f"{names[index]} {100 * scores[index]:.1f} %" for index in best)
        print(f"{path}: {told}")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
