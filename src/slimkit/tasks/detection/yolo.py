"""YOLO's annotation format: one text file per image, a box per line, relative to the image.

``DIR/images/SPLIT/NAME.jpg`` and ``DIR/labels/SPLIT/NAME.txt`` with lines ``class x y w h``
(centre and size, 0 … 1); names of classes in ``DIR/data.yaml`` (``names:``) or
``DIR/classes.txt``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimkit.errors import DataError
from slimkit.tasks.data.sources import data_folder, files_digest
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet, checked_boxes

__all__ = ["read_yolo"]

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def read_yolo(argument: str, problems: Problems) -> SceneSet:
    """Read ``yolo:DIR``. An image without a text file is one without objects.

    Raises:
        DataError: folders or names of classes are missing, or a split has no image.
    """
    root = data_folder(argument, "yolo")
    classes = _classes(root)
    splits: dict[str, list[Scene]] = {}
    files: list[Path] = []
    for split in ("train", "val", "test"):
        folder = root / "images" / split
        if not folder.is_dir():
            continue
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in _IMAGES)
        if not images:
            raise DataError("there is no image in it", where=str(folder))
        labels = root / "labels" / split
        if not labels.is_dir():
            raise DataError("there is no such folder", where=str(labels))
        splits[split] = []
        for number, path in enumerate(images):
            scene = _scene(path, labels / f"{path.stem}.txt", number, classes, problems)
            if scene is not None:
                splits[split].append(scene)
        files += sorted(labels.glob("*.txt"))
        if not splits[split]:
            raise DataError("not one of its images can be read", where=str(folder))
    if "train" not in splits:
        raise DataError("there is no images/train", where=str(root))
    return SceneSet(dict(splits), classes, files_digest(files), problems)


def _classes(root: Path) -> list[str]:
    listed = root / "classes.txt"
    if listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
        return [name for name in names if name]
    import yaml

    for file in sorted(root.glob("*.yaml")) + sorted(root.glob("*.yml")):
        try:
            content: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise DataError(f"it cannot be read: {error}", where=str(file)) from error
        named: Any = content.get("names") if isinstance(content, dict) else None
        if isinstance(named, dict):
            return [str(named[key]) for key in sorted(named)]
        if isinstance(named, list):
            return [str(name) for name in named]
    raise DataError(
        "nothing names the classes",
        where=str(root),
        hint="add classes.txt, a name per line, or data.yaml with names:",
    )


def _scene(
    path: Path, annotation: Path, number: int, classes: list[str], problems: Problems
) -> Scene | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            size = image.height, image.width
    except OSError:
        problems.note("an image that cannot be read", path.name)
        return None
    rows: list[tuple[list[float], int, bool, float | None]] = []
    lines = annotation.read_text(encoding="utf-8").splitlines() if annotation.is_file() else []
    for count, line in enumerate(lines, start=1):
        where = f"{annotation.name}, line {count}"
        if not line.strip():
            continue
        try:
            label, x, y, w, h = (float(value) for value in line.split()[:5])
        except ValueError:
            problems.note("a line without five numbers", where)
            continue
        if label != int(label) or not 0 <= label < len(classes):
            problems.note("a box of an unknown category", where)
            continue
        height, width = size
        left, top = (x - w / 2) * width, (y - h / 2) * height
        corners = [left, top, left + w * width, top + h * height]
        rows.append((corners, int(label), False, None))
    return Scene(path, size, *checked_boxes(rows, size, problems, annotation.name), number)
