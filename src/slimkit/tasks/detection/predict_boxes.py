"""Find objects in images with the model beside this file.

    python predict.py IMAGE [IMAGE …] [--out DIR] [--score 0.4]

Prints a line per object; with --out, images with boxes are written to DIR. Needs numpy, pillow
and onnxruntime only. What the model expects is in its own metadata.
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
from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = ["draw", "find", "load", "main", "prepare", "suppressed"]


def load(path: Path) -> tuple[Any, ...]:
    """The session, and what the file says of preprocessing, classes and suppression."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    keys = ("preprocessing", "classes", "detection")
    return session, *(json.loads(metadata[f"slimkit.{key}"]) for key in keys)


def prepare(image: Any, expected: dict[str, Any], size: Sequence[int]) -> tuple[Any, Any, Any]:
    """An image as the model's input (1, 3, H, W), with its scale and shift for x and y."""
    height, width = size
    scale = (width / image.width, height / image.height)
    target, shift = (width, height), (0, 0)
    if expected["resize"] == "letterbox":
        factor = min(scale)
        target = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        scale = (target[0] / image.width, target[1] / image.height)
        shift = ((width - target[0]) // 2, (height - target[1]) // 2)
    canvas = Image.new("RGB", (width, height), (expected["pad"],) * 3)
    canvas.paste(image.resize(target, Image.Resampling.BILINEAR), shift)
    pixels = np.asarray(canvas, dtype=np.float32) / expected["scale"]
    pixels = (pixels - np.float32(expected["mean"])) / np.float32(expected["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), scale, shift


def suppressed(boxes: Any, scores: Any, iou: float) -> list[int]:
    """Greedy non-maximum suppression: indices of boxes that overlap no better one."""
    order = np.argsort(-scores)
    kept: list[int] = []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[order, :2])
        high = np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        order = order[shared <= iou * (areas[best] + areas[order] - shared)]
    return kept


def find(
    session: Any, image: Any, expected: dict[str, Any], settings: dict[str, Any], least: float
) -> list[tuple[Any, ...]]:
    """Objects in an image: (label, score, x1, y1, x2, y2) in its pixels, best first."""
    entry = session.get_inputs()[0]
    sides = [side for side in entry.shape[2:] if isinstance(side, int)]  # others are open
    size = expected["size"] or (sides if len(sides) == 2 else [image.height, image.width])
    pixels, scale, shift = prepare(image, expected, size)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {entry.name: pixels}), strict=True))
    boxes, scores = outputs["boxes"][0], outputs["scores"][0]
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, dtype=np.float32))
    found: list[tuple[Any, ...]] = []
    for label in range(scores.shape[1]):
        sure = np.flatnonzero(scores[:, label] >= max(least, settings["score"]))
        kept = sure[suppressed(boxes[sure], scores[sure, label], settings["iou"])]
        found += [(label, float(scores[index, label]), boxes[index]) for index in kept]
    found.sort(key=lambda row: -row[1])
    return [
        (label, score, *((box - np.float32(shift * 2)) / np.float32(scale * 2)).tolist())
        for label, score, box in found[: settings["most"]]
    ]


def draw(image: Any, found: Sequence[tuple[Any, ...]], classes: Sequence[str]) -> Any:
    """The image with boxes, one colour per class."""
    image = image.copy()
    drawing = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(10, min(image.size) // 28))
    for label, score, *box in reversed(found):
        colour = f"hsl({label * 137 % 360}, 90%, 40%)"
        drawing.rectangle(box, outline=colour, width=max(1, max(image.size) // 300))
        text = f"{classes[label]} {100 * score:.0f}"
        height = drawing.textbbox((0, 0), text, font=font)[3]
        place = (box[0], max(0, box[1] - height - 3))
        ground = drawing.textbbox(place, text, font=font)
        drawing.rectangle((ground[0] - 2, ground[1] - 1, ground[2] + 2, ground[3] + 1), fill=colour)
        drawing.text(place, text, fill="white", font=font)
    return image


def main(arguments: Sequence[str] | None = None, model: Path | None = None) -> None:
    """Command line; ``model`` is the file to run, by default the one beside this."""
    parser = argparse.ArgumentParser(prog="predict", description="Find objects in images.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, help="write images with boxes to this folder")
    parser.add_argument("--score", type=float, default=0.4, help="least score (default: 0.4)")
    chosen = parser.parse_args(arguments)
    loaded = load(model or Path(__file__).with_name("model.onnx"))
    session, expected, classes, settings = loaded
    for path in chosen.images:
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except OSError as error:
            sys.exit(f"{path}: {error}")
        found = find(session, image, expected, settings, chosen.score)
        for label, score, *box in found:
            place = ", ".join(f"{value:.0f}" for value in box)
            print(f"{path}: {classes[label]} {100 * score:.1f} % at {place}")
        if not found:
            print(f"{path}: nothing with a score of at least {chosen.score}")
        if chosen.out is not None:
            chosen.out.mkdir(parents=True, exist_ok=True)
            draw(image, found, classes).save(chosen.out / path.name)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
