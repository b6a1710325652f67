"""Segmentation: folders of masks, metrics by hand, joint changes, a recipe end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import DataError, InputError, ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.recipe import parse_recipe, run_recipe
from slimkit.tasks import TASKS
from slimkit.tasks.conformance import check_task
from slimkit.tasks.segmentation.masks import VOID
from slimkit.tasks.segmentation.samples import Augment, Sample
from slimkit.tasks.segmentation.scoring import (
    confusion_of,
    intersection_over_union,
    segmentation_metrics,
)
from slimkit.tasks.segmentation.settings import MaskAugmentSettings, SegmentationDataSettings
from slimkit.tasks.segmentation.task import SegmentationTask


class TinySegmenter(nn.Module):
    """Two strided convolutions, two heads; a mapping, as torchvision's segmenters return."""

    def __init__(self, num_classes: int = 11, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        self.aux = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.stem(x)
        deep = self.body(low)
        size = x.shape[-2:]
        found = {"out": F.interpolate(self.head(deep), size, mode="bilinear")}
        if self.training:
            found["aux"] = F.interpolate(self.aux(low), size, mode="bilinear")
        return found


def tiny(num_classes: int = 11) -> nn.Module:
    torch.manual_seed(0)
    return TinySegmenter(num_classes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/images/{split}/{number}.jpg")
            labels = rng.integers(0, 4, (24, 32), np.uint8)
            labels[labels == 3] = 11
            Image.fromarray(labels).save(tmp_path / f"data/masks/{split}/{number}.png")
    (tmp_path / "data" / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path / "data"


def settings(folder: Path, **more: Any) -> SegmentationDataSettings:
    return SegmentationDataSettings(source=f"masks:{folder}", void=11, batch_size=2, **more)


def test_iou_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 1], [1, 1, VOID]]])
    said = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    logits = F.one_hot(said, 4).permute(0, 3, 1, 2).float()
    found = confusion_of([(logits, truth)])
    assert found.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = intersection_over_union(found)
    assert iou[0] == pytest.approx(100 / 3)
    assert iou[1] == pytest.approx(50)
    assert iou[2:] == [None, None]
    metrics = segmentation_metrics(found)
    assert metrics["miou"] == pytest.approx((100 / 3 + 50) / 2)
    assert metrics["pixel_accuracy"] == pytest.approx(60)
    with pytest.raises(ModelError, match="class 3, the model 2"):
        confusion_of([(logits[:, :2], torch.full_like(truth, 3))])
    with pytest.raises(InputError, match="no batch"):
        confusion_of([])


def test_void_has_no_loss_and_auxiliary_logits_have_some() -> None:
    task = SegmentationTask()
    model = tiny(3).train()
    images, masks = torch.randn(2, 3, 16, 16), torch.full((2, 16, 16), VOID)
    loss, _ = task.loss(model, Batch(Inputs((images,)), masks))
    assert float(loss) == 0.0
    loss.backward()
    masks[:, :8] = 1
    both, outputs = task.loss(model, Batch(Inputs((images,)), masks))
    main = F.cross_entropy(outputs["out"][:, :, :8], masks[:, :8])
    aux = F.cross_entropy(outputs["aux"][:, :, :8], masks[:, :8])
    assert float(both) == pytest.approx(float(main + 0.4 * aux), rel=1e-5)


def test_image_and_mask_change_alike() -> None:
    pixels = torch.zeros(3, 20, 30, dtype=torch.uint8)
    mask = torch.zeros(20, 30, dtype=torch.uint8)
    pixels[:, 5:12, 8:20] = 200
    mask[5:12, 8:20] = 1
    augment = Augment(MaskAugmentSettings(flip=0.5, scale=(0.5, 2.0), colour=0.0), (20, 30))
    seen = set()
    for seed in range(40):
        found = augment(Sample(pixels, mask), torch.Generator().manual_seed(seed))
        assert found.pixels.shape == (3, 20, 30)
        inside = found.mask != VOID
        bright = found.pixels[0] > 100
        differ = (bright != (found.mask == 1)) & inside
        assert int(differ.sum()) <= 60  # a border of a pixel: one is smoothed, the other is not
        seen.add((int(found.mask.sum()), bool((found.mask == VOID).any())))
    assert len(seen) > 10
    again = augment(Sample(pixels, mask), torch.Generator().manual_seed(3))
    same = augment(Sample(pixels, mask), torch.Generator().manual_seed(3))
    assert torch.equal(again.pixels, same.pixels)


def test_a_folder_of_masks_is_read_and_resized(folder: Path) -> None:
    task = TASKS.get("segmentation").model_validate({})
    splits = task.load(settings(folder, image_size=(16, 24)))
    assert splits.classes == ["sky", "road", "car"]
    batch = next(iter(splits.test))
    assert tuple(batch.inputs.args[0].shape) == (3, 3, 16, 24)
    assert set(batch.targets.unique().tolist()) == {0, 1, 2, VOID}
    for batch in splits.train:
        assert tuple(batch.targets.shape[1:]) == (16, 24)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "masks/train/0.png").unlink(), "no mask for the image"),
        (
            lambda d: Image.new("L", (8, 8)).save(d / "masks/train/0.png"),
            "8×8 pixels, its image 32×24",
        ),
        (lambda d: Image.new("RGB", (32, 24)).save(d / "masks/train/0.png"), "of mode RGB"),
        (
            lambda d: Image.new("L", (32, 24), 7).save(d / "masks/train/0.png"),
            "the number 7, and there are 3 classes",
        ),
        (lambda d: (d / "masks/train/0.png").write_bytes(b"PNG"), "cannot be read"),
        (lambda d: (d / "images/train/0.jpg").write_bytes(b"JPG"), "its image cannot be read"),
        (lambda d: (d / "classes.txt").write_text("a\na\n"), "a different name in every line"),
    ],
)
def test_masks_that_do_not_fit_are_named_or_counted(folder: Path, damage: Any, told: str) -> None:
    damage(folder)
    task = SegmentationTask()
    with pytest.raises(DataError, match=told) as caught:
        task.load(settings(folder))
    assert caught.value.where
    if "every line" in told:
        return
    splits = task.load(settings(folder, on_bad_mask="skip"))
    (problem,) = splits.facts["problems"].values()
    assert problem["count"] == 1
    assert splits.calibration.samples + splits.validation.samples == 5  # type: ignore[union-attr]


def test_missing_folders_are_told(folder: Path, tmp_path: Path) -> None:
    task = SegmentationTask()
    with pytest.raises(DataError, match="there is no folder"):
        task.load(settings(tmp_path / "nowhere"))
    for path in (folder / "images" / "val").iterdir():
        path.unlink()
    (folder / "images" / "val").rmdir()
    with pytest.raises(DataError, match="no val and no test"):
        task.load(settings(folder))


def test_the_task_keeps_its_promises() -> None:
    check_task(
        "segmentation", {"source": "digit-masks:6", "limit": 6, "batch_size": 2}, model=tiny()
    )
    check_task("segmentation", {"image_size": 32}, model=tiny(4), smoke=True)


def test_a_model_of_other_classes_is_refused() -> None:
    task = SegmentationTask()
    splits = task.load(SegmentationDataSettings(source="digit-masks:6", limit=4))
    with pytest.raises(ModelError, match="the model has 4 classes, but the data has 11"):
        task.check_head(tiny(4), splits)
    with pytest.raises(ModelError, match="expected logits"):
        task.check_head(nn.Sequential(nn.Flatten(), nn.Linear(3 * 96 * 96, 2)), splits)


def test_a_recipe_ends_in_masks_a_file_and_a_script_that_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    training = {"type": "train", "epochs": 1, "lr": 0.05, "precision": "fp32"}
    recipe = {
        "name": "masks",
        "task": "segmentation",
        "data": {"source": "digit-masks:32", "limit": 32, "batch_size": 8},
        "model": {"name": "test_segmentation:tiny"},
        "stages": {
            "train": training,
            "prune": {"type": "prune", "ratio": 0.5, "round_to": 4, "batch_norm_reestimation": 0},
            "recover": {
                **training,
                "teacher": "unpruned",
                "distill": [{"type": "cwd", "student": "head", "teacher": "head"}],
            },
            "int8": {"type": "ptq", "batches": 1},
        },
        "variants": {"baseline": ["train"], "small": ["train", "prune", "recover", "int8"]},
        "measure": {"seconds": 0.02, "parity_batches": 1},
    }
    report = run_recipe(
        parse_recipe(recipe), tmp_path / "out", cache=tmp_path / "cache", progress=False
    )
    small = report["variants"][-1]
    assert 0 <= small["metrics"]["miou"] <= 100
    assert small["cost"]["params"] < 0.6 * report["variants"][0]["cost"]["params"]
    masks, per_class = report["drawings"]
    assert (masks["kind"], masks["columns"]) == ("samples", ["annotated", "baseline", "small"])
    assert len(per_class["rows"]) == 11
    photograph = tmp_path / "photo.png"
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(photograph)
    script = tmp_path / "out" / "variants" / "small" / "predict.py"
    done = subprocess.run(
        [sys.executable, str(script), str(photograph), "--out", str(tmp_path / "drawn")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert " %" in done.stdout
    assert Image.open(tmp_path / "drawn" / "photo.mask.png").size == (60, 50)
    assert Image.open(tmp_path / "drawn" / "photo.png").size == (60, 50)
    json.dumps(report)
