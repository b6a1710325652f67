"""Pascal VOC's annotation format (Everingham et al. 2010): one XML file per image.

``DIR/Annotations/NAME.xml``, ``DIR/JPEGImages/NAME.jpg``, and lists of names in
``DIR/ImageSets/Main/SPLIT.txt``.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from slimkit.errors import DataError
from slimkit.tasks.data.sources import data_folder, files_digest
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet, checked_boxes

__all__ = ["read_voc"]

_Row = tuple[list[float], str, bool]


def read_voc(argument: str, problems: Problems) -> SceneSet:
    """Read ``voc:DIR``; classes are the sorted names in the annotations.

    Objects marked difficult count as crowds: evaluation and training ignore them.

    Raises:
        DataError: a folder or list is missing, or not one image of a split is there.
    """
    root = data_folder(argument, "voc")
    lists = {
        split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")
    }
    found = {split: path for split, path in lists.items() if path.is_file()}
    if "train" not in found:
        raise DataError("there is no ImageSets/Main/train.txt", where=str(root))
    read: dict[str, list[tuple[Path, tuple[int, int], list[_Row]]]] = {}
    files: list[Path] = []
    for split, path in found.items():
        read[split] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            annotation = root / "Annotations" / f"{name}.xml"
            files.append(annotation)
            entry = _read(annotation, root / "JPEGImages", name, problems)
            if entry is not None:
                read[split].append(entry)
        if not read[split]:
            raise DataError("not one of its images is there", where=str(path))
    classes = sorted(
        {row[1] for entries in read.values() for _, _, rows in entries for row in rows}
    )
    if not classes:
        raise DataError("the annotations name no object", where=str(root))
    order = {name: label for label, name in enumerate(classes)}
    splits: dict[str, list[Scene]] = {}
    for split, entries in read.items():
        splits[split] = []
        for number, (path, size, rows) in enumerate(entries):
            checked = checked_boxes(
                ((box, order[name], difficult, None) for box, name, difficult in rows),
                size,
                problems,
                path.name,
            )
            splits[split].append(Scene(path, size, *checked, number))
    digest = files_digest([*found.values(), *(file for file in files if file.is_file())])
    return SceneSet(dict(splits), classes, digest, problems)


def _read(
    annotation: Path, images: Path, name: str, problems: Problems
) -> tuple[Path, tuple[int, int], list[_Row]] | None:
    path = next((p for p in sorted(images.glob(f"{name}.*")) if p.is_file()), None)
    if path is None:
        problems.note("an image whose file is missing", name)
        return None
    try:
        tree = ET.parse(annotation).getroot()
    except (OSError, ET.ParseError) as error:
        problems.note(
            f"an annotation that cannot be read ({type(error).__name__})", annotation.name
        )
        return None
    rows: list[_Row] = []
    for item in tree.iter("object"):
        box, label = item.find("bndbox"), item.findtext("name")
        try:
            corners = [float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax")]  # type: ignore[union-attr]
        except (AttributeError, ValueError):
            problems.note("a box without four numbers", annotation.name)
            continue
        if not label:
            problems.note("an object without a name", annotation.name)
            continue
        # VOC counts pixels from 1, and both corners are inside
        box_of = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
        rows.append((box_of, label, item.findtext("difficult") == "1"))
    return path, _size(tree, path), rows


def _size(tree: ET.Element, path: Path) -> tuple[int, int]:
    try:
        size = tree.find("size")
        height, width = int(size.findtext("height") or 0), int(size.findtext("width") or 0)  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        height = width = 0
    if height > 0 and width > 0:
        return height, width
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError as error:
        raise DataError(f"the image cannot be read: {error}", where=str(path)) from error
