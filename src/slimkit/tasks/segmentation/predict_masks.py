"""Segment images with the model beside this file.

    python predict.py IMAGE [IMAGE …] [--out DIR]

Prints the share of each class in an image; with --out, masks in colour and over the image are
written to DIR. Needs numpy, pillow and onnxruntime only. What the model expects is in its own
metadata.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

__all__ = ["colours", "load", "main", "segment"]


def load(path: Path) -> tuple[Any, Any, Any]:
    """The session, and what the file says of preprocessing and classes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata["slimkit.preprocessing"])
    return session, preprocessing, json.loads(metadata["slimkit.classes"])


def colours(count: int) -> list[tuple[int, int, int]]:
    """A colour for each class: hues by the golden angle, light and dark in turns."""
    found = []
    for number in range(count):
        hue, light = (number * 0.381966) % 1, (0.5, 0.7, 0.35)[number % 3]
        red, green, blue = colorsys.hls_to_rgb(hue, light, 0.75)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


def segment(session: Any, image: Any, expected: dict[str, Any]) -> Any:
    """The class of each pixel of an image, uint8 (H, W)."""
    entry = session.get_inputs()[0]
    sides = [side for side in entry.shape[2:] if isinstance(side, int)]  # others are open
    size = expected["size"] or (sides if len(sides) == 2 else [image.height, image.width])
    small = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.float32) / expected["scale"]
    pixels = (pixels - np.float32(expected["mean"])) / np.float32(expected["std"])
    batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
    labels = session.run(None, {entry.name: batch})[0][0].argmax(0).astype(np.uint8)
    mask = Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST)
    return np.asarray(mask)


def main(arguments: Sequence[str] | None = None, model: Path | None = None) -> None:
    """Command line; ``model`` is the file to run, by default the one beside this."""
    parser = argparse.ArgumentParser(prog="predict", description="Segment images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, help="write masks and painted images to this folder")
    chosen = parser.parse_args(arguments)
    session, expected, classes = load(model or Path(__file__).with_name("model.onnx"))
    for path in chosen.images:
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            sys.exit(f"{path}: {error}")
        labels = segment(session, image, expected)
        shares = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
        order = [index for index in np.argsort(-shares) if shares[index]]
        print(f"{path}: " + "  ".join(f"{classes[i]} {100 * shares[i]:.1f} %" for i in order))
        if chosen.out is not None:
            chosen.out.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(chosen.out / f"{path.stem}.mask.png")
            palette = np.array(colours(len(classes)), dtype=np.uint8)
            painted = Image.blend(Image.fromarray(palette[labels]), image, 0.45)
            painted.save(chosen.out / f"{path.stem}.png")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
