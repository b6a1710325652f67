"""COCO's annotation format (Lin et al. 2014): one JSON file per split.

``DIR/annotations/instances_SPLIT.json`` (a year may follow the split's name), images in
``DIR/images/SPLIT``, ``DIR/SPLIT`` or ``DIR/images``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.errors import DataError
from slimkit.tasks.data.sources import data_folder, files_digest
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet, checked_boxes

__all__ = ["read_coco"]


def read_coco(argument: str, problems: Problems) -> SceneSet:
    """Read ``coco:DIR``. Category ids may have gaps; classes are in the order of the ids.

    Raises:
        DataError: no annotations, not COCO's format, splits with other categories, or not one
            image of a split is there.
    """
    root = data_folder(argument, "coco")
    folder = root / "annotations" if (root / "annotations").is_dir() else root
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"(?:instances_)?(train|val|test)(?:20\d\d)?", file.stem)
        if match:
            found.setdefault(match[1], file)
    if "train" not in found:
        there = ", ".join(sorted(path.name for path in folder.glob("*.json"))[:5])
        raise DataError(
            "there is no instances_train.json",
            where=str(folder),
            hint=f"it has {there or 'no .json'}",
        )
    splits: dict[str, list[Scene]] = {}
    names: dict[int, str] = {}
    for split, file in found.items():
        content = _content(file)
        own = _categories(content, file)
        if names and own != names:
            raise DataError(
                f"its categories are others than those of {found['train'].name}", where=str(file)
            )
        names = own
        splits[split] = _scenes(content, file, _image_folders(root, split), names, problems)
    digest = files_digest(list(found.values()))
    return SceneSet(dict(splits), [names[key] for key in sorted(names)], digest, problems)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"it cannot be read: {error}", where=str(file)) from error
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise DataError(
            f"it is not COCO's format: there is no list {', '.join(missing)}", where=str(file)
        )
    if not content["images"]:
        raise DataError("it names no image", where=str(file))
    checked: dict[str, Any] = content
    return checked


def _categories(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a category without id or name: {error!r}", where=str(file)) from error
    if not names:
        raise DataError("it names no category", where=str(file))
    return names


def _image_folders(root: Path, split: str) -> list[Path]:
    places = [root / "images" / split, root / split, root / "images", root]
    return [*places, *sorted(root.glob(f"**/{split}20??"))]


def _scenes(
    content: Mapping[str, Any],
    file: Path,
    folders: list[Path],
    names: Mapping[int, str],
    problems: Problems,
) -> list[Scene]:
    order = {key: label for label, key in enumerate(sorted(names))}
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in content["annotations"]:
        if isinstance(entry, dict):
            by_image.setdefault(entry.get("image_id"), []).append(entry)
        else:
            problems.note("an annotation that is no object", file.name)
    scenes = []
    for entry in content["images"]:
        scene = _scene(entry, file, folders, order, by_image, problems)
        if scene is not None:
            scenes.append(scene)
    for number in by_image:
        problems.note("annotations of an image that is not listed", f"{file.name}, image {number}")
    if not scenes:
        raise DataError(
            "not one of its images is there", where=str(file), hint=f"looked in {folders[0]}"
        )
    return scenes


def _scene(
    entry: Any,
    file: Path,
    folders: list[Path],
    order: Mapping[int, int],
    by_image: dict[Any, list[Mapping[str, Any]]],
    problems: Problems,
) -> Scene | None:
    try:
        number, name = int(entry["id"]), str(entry["file_name"])
        size = int(entry["height"]), int(entry["width"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"an image without id, file_name, height or width: {error!r}", where=str(file)
        ) from error
    annotations = by_image.pop(number, [])
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        problems.note("an image whose file is missing", f"{file.name}: {name}")
        return None
    rows: list[tuple[list[float], int, bool, float | None]] = []
    for annotation in annotations:
        label = order.get(annotation.get("category_id", -1))
        if label is None:
            problems.note("a box of an unknown category", f"{file.name}: {name}")
            continue
        try:
            x, y, width, height = (float(value) for value in annotation["bbox"])
            area = annotation.get("area")
            area = None if area is None else float(area)
        except (KeyError, TypeError, ValueError):
            problems.note("a box without four numbers", f"{file.name}: {name}")
            continue
        crowd = bool(annotation.get("iscrowd", 0))
        rows.append(([x, y, x + width, y + height], label, crowd, area))
    boxes, labels, crowds, areas = checked_boxes(rows, size, problems, f"{file.name}: {name}")
    return Scene(path, size, boxes, labels, crowds, areas, number)
