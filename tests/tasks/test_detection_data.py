"""Scenes: what the three formats say, what is wrong with them, and boxes that stay on objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slimkit.errors import DataError, UnknownNameError
from slimkit.tasks.detection.augmentation import Augment
from slimkit.tasks.detection.coco import read_coco
from slimkit.tasks.detection.digit_scenes import read_digit_scenes
from slimkit.tasks.detection.loading import load_scenes
from slimkit.tasks.detection.samples import Placement, Sample, SceneSamples, place
from slimkit.tasks.detection.scenes import Problems, Scene, SceneSet
from slimkit.tasks.detection.settings import BoxAugmentSettings, DetectionDataSettings
from slimkit.tasks.detection.voc import read_voc
from slimkit.tasks.detection.yolo import read_yolo

STILL = BoxAugmentSettings(flip=0, scale=None, colour=0)


def image_file(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(path)


def coco_folder(
    root: Path, annotations: list[dict[str, Any]], changes: dict[str, Any] | None = None
) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}],
        "annotations": annotations,
        **(changes or {}),
    }
    for split in ("train", "val"):
        image_file(root / "images" / split / "a.png")
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def box(category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": category, "bbox": list(bbox), **more}


def test_coco_ids_with_gaps_become_labels_in_their_order(tmp_path: Path) -> None:
    rows = [box(90, 1, 2, 10, 12, area=50.0), box(3, 5, 5, 4, 4, iscrowd=1)]
    found = read_coco(str(coco_folder(tmp_path, rows)), Problems())
    (scene,) = found.splits["train"]
    assert found.classes == ["early", "late"]
    assert scene.labels.tolist() == [1, 0]
    assert scene.boxes.tolist() == [[1, 2, 11, 14], [5, 5, 9, 9]]
    assert scene.crowd.tolist() == [False, True]
    assert scene.area.tolist() == [50, 16]
    assert set(found.splits) == {"train", "val"}
    assert not found.problems.counts


BAD = {
    "a box of zero size": box(3, 5, 5, 0, 4),
    "a box outside of its image": box(3, 50, 5, 4, 4),
    "a box that reaches over its image, cut at the edge": box(3, 35, 5, 20, 4),
    "a box of an unknown category": box(4, 5, 5, 4, 4),
    "a box without four numbers": box(3, 5, 5, 4),
    "a box that is not a number": box(3, float("nan"), 5, 4, 4),
    "annotations of an image that is not listed": box(3, 5, 5, 4, 4) | {"image_id": 8},
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_counted_or_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    folder = str(coco_folder(tmp_path, [box(3, 1, 1, 5, 5), BAD[kind]]))
    found = read_coco(folder, Problems())
    assert found.problems.counts == {kind: 2}  # in both splits
    assert "instances_" in found.problems.first[kind]
    (scene,) = found.splits["train"]
    assert bool((scene.boxes[:, 2:] <= torch.tensor([40, 30])).all())
    assert len(scene.boxes) == (2 if "cut" in kind else 1)
    with pytest.raises(DataError, match=kind[:20]) as raised:
        read_coco(folder, Problems("error"))
    assert "on_bad_annotation" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "names no image"),
        ({"categories": []}, "names no category"),
        ({"annotations": None}, "no list annotations"),
        ({"images": [{"id": 1}]}, "without id, file_name"),
        ({"images": [{"id": 7, "file_name": "b.png", "width": 4, "height": 3}]}, "not one of its"),
    ],
)
def test_annotations_of_another_kind_say_what_is_missing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read_coco(str(coco_folder(tmp_path, [], changes)), Problems())
    assert "instances_train.json" in str(raised.value)


def test_an_empty_annotation_file_and_a_missing_one(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, [])
    (folder / "annotations" / "instances_train.json").write_text("")
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(str(folder), Problems())
    (folder / "annotations" / "instances_train.json").unlink()
    with pytest.raises(DataError, match=r"no instances_train\.json") as raised:
        read_coco(str(folder), Problems())
    assert "instances_val.json" in str(raised.value)


def test_voc_counts_pixels_from_one_and_difficult_objects_as_crowds(tmp_path: Path) -> None:
    image_file(tmp_path / "JPEGImages" / "x.png")
    thing = (
        "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
        "<xmax>10</xmax><ymax>20</ymax></bndbox></object>"
    )
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "x.xml").write_text(
        f"<annotation>{thing.format('dog', 0)}{thing.format('cat', 1)}<object/></annotation>"
    )
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("x 1\nmissing\n")
    found = read_voc(str(tmp_path), Problems())
    (scene,) = found.splits["train"]
    assert found.classes == ["cat", "dog"]
    assert scene.size == (30, 40)
    assert scene.boxes.tolist() == [[0, 0, 10, 20]] * 2
    assert scene.labels.tolist() == [1, 0]
    assert scene.crowd.tolist() == [False, True]
    expected = {"an image whose file is missing": 2, "a box without four numbers": 2}
    assert found.problems.counts == expected


def test_yolo_boxes_are_relative_and_an_image_without_a_file_is_empty(tmp_path: Path) -> None:
    for split in ("train", "val"):
        image_file(tmp_path / "images" / split / "a.png")
        image_file(tmp_path / "images" / split / "b.png")
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "a.txt").write_text("1 0.5 0.5 0.5 0.2\n7 0 0 1 1\nx\n")
    with pytest.raises(DataError, match="names the classes"):
        read_yolo(str(tmp_path), Problems())
    (tmp_path / "data.yaml").write_text("names: {0: a, 1: b}")
    found = read_yolo(str(tmp_path), Problems())
    full, empty = found.splits["train"]
    assert full.boxes[0].tolist() == pytest.approx([10, 12, 30, 18])
    assert empty.boxes.shape == (0, 4)
    assert found.problems.counts == {
        "a box of an unknown category": 2,
        "a line without five numbers": 2,
    }


def test_digit_scenes_are_the_same_every_time_and_no_split_shares_a_digit() -> None:
    first, second = (read_digit_scenes("5", Problems()) for _ in range(2))
    scenes = first.splits["train"]
    assert len(scenes) == 5
    assert len(first.classes) == 10
    for one, other in zip(scenes, second.splits["train"], strict=True):
        assert isinstance(one.image, Tensor)
        assert isinstance(other.image, Tensor)
        assert torch.equal(one.image, other.image)
        assert 2 <= len(one.boxes) <= 6
    with pytest.raises(DataError, match="1 … 100000"):
        read_digit_scenes("none", Problems())


def marked(size: tuple[int, int], corners: tuple[int, int, int, int]) -> Scene:
    """A black image with one white box."""
    pixels = torch.zeros(3, *size, dtype=torch.uint8)
    x1, y1, x2, y2 = corners
    pixels[:, y1:y2, x1:x2] = 255
    return Scene(
        pixels, size, torch.tensor([corners]).float(), torch.tensor([0]),
        torch.tensor([False]), torch.tensor([1.0]), 0,
    )  # fmt: skip


def white_box(pixels: Tensor) -> list[int]:
    bright = pixels[0] > 180
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize(
    "settings",
    [
        STILL.model_copy(update={"flip": 1.0}),
        STILL.model_copy(update={"vertical_flip": 1.0}),
        STILL.model_copy(update={"scale": (0.7, 1.4), "aspect": 1.3}),
        BoxAugmentSettings(flip=0.5, vertical_flip=0.5, scale=(0.5, 1.5), colour=0),
    ],
)
@pytest.mark.parametrize("letterbox", [False, True])
def test_boxes_follow_their_object_through_random_changes(
    settings: BoxAugmentSettings, letterbox: bool
) -> None:
    samples = SceneSamples([marked((60, 90), (35, 15, 60, 40))], (64, 64), whole=True)
    augment = Augment(settings, samples, (64, 64), letterbox)
    seen = 0
    for seed in range(20):
        changed = augment(samples[0], torch.Generator().manual_seed(seed))
        assert changed.pixels.shape == (3, 64, 64)
        if len(changed.boxes) == 1:
            seen += 1
            assert changed.boxes[0].tolist() == pytest.approx(white_box(changed.pixels), abs=1.6)
    assert seen >= 15


def test_a_mosaic_and_a_mixture_hold_the_boxes_of_all_their_images() -> None:
    scenes = [marked((64, 64), (8, 8, 56, 56)) for _ in range(3)]
    samples = SceneSamples(scenes, (64, 64), whole=True)
    mosaic = Augment(STILL.model_copy(update={"mosaic": 1.0}), samples, (64, 64))
    changed = mosaic(samples[0], torch.Generator().manual_seed(0))
    assert len(changed.boxes) == 4
    for x1, y1, x2, y2 in changed.boxes.round().int().tolist():
        assert float(changed.pixels[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].float().mean()) > 240
    mixed = Augment(STILL.model_copy(update={"mixup": 1.0}), samples, (64, 64))
    assert len(mixed(samples[0], torch.Generator().manual_seed(0)).boxes) == 2


def test_random_changes_depend_on_seed_and_epoch_alone() -> None:
    settings = DetectionDataSettings(source="digit-scenes:6", batch_size=3)
    one, two = load_scenes(settings).train, load_scenes(settings).train
    for loader in (one, two):
        loader.set_seed(3)
        loader.set_epoch(1)
    first = [batch.inputs.args[0] for batch in one]
    again = [batch.inputs.args[0] for batch in two]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    two.set_epoch(2)
    other = [batch.inputs.args[0] for batch in two]
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("letterbox", [False, True])
def test_placed_boxes_go_back_to_the_image(letterbox: bool) -> None:
    scene = marked((50, 80), (10, 20, 30, 40))
    sample = Sample(scene.image, scene.boxes, scene.labels, scene, Placement())  # type: ignore[arg-type]
    placed = place(sample, (64, 64), letterbox=letterbox)
    assert placed.placement is not None
    torch.testing.assert_close(placed.placement.to_image(placed.boxes), scene.boxes)
    assert white_box(placed.pixels) == pytest.approx(placed.boxes[0].tolist(), abs=1)
    if letterbox:
        assert int(placed.pixels[0, 0, 0]) == 114


def test_crowds_are_kept_for_evaluation_and_left_out_of_training() -> None:
    scene = marked((64, 64), (8, 8, 56, 56))
    crowd = Scene(
        scene.image, scene.size, scene.boxes, scene.labels, torch.tensor([True]), scene.area, 0
    )
    assert len(SceneSamples([crowd], (64, 64), whole=True)[0].boxes) == 0
    assert len(SceneSamples([crowd], (64, 64))[0].boxes) == 1


def test_without_a_test_split_the_validation_split_is_reported(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, [box(3, 1, 1, 5, 5)])
    settings = DetectionDataSettings(source=f"coco:{folder}", validation=0)
    splits = load_scenes(settings)
    assert splits.validation is None
    assert (splits.train.samples, splits.test.samples) == (1, 1)
    with pytest.raises(DataError, match="would be set aside"):
        load_scenes(settings.model_copy(update={"validation": 1}))


def test_an_image_of_another_size_than_annotated_is_named(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path, [box(3, 1, 1, 5, 5)])
    image_file(folder / "images" / "train" / "a.png", (80, 60))
    splits = load_scenes(DetectionDataSettings(source=f"coco:{folder}", validation=0))
    with pytest.raises(DataError, match="80×60 pixels, its annotation says 40×30"):
        next(iter(splits.train))
    (folder / "images" / "val" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read"):
        next(iter(splits.test))


def test_unknown_sources_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="digit-scenes"):
        load_scenes(DetectionDataSettings(source="digit-scene"))


def test_an_empty_scene_set_is_not_split() -> None:
    from slimkit.tasks.detection.loading import splits_of

    found = SceneSet({"train": [marked((64, 64), (8, 8, 56, 56))]}, ["a"], "")
    with pytest.raises(DataError, match="neither a val nor a test split"):
        splits_of(found, DetectionDataSettings())
