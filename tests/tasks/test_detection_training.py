"""Training of detectors: bad batches are named, empty ones train, the original teaches."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_detector import TinyDetector, tiny_detector
from torch import Tensor

from slimkit.artifact import write_tensors
from slimkit.distill import Distiller
from slimkit.errors import CheckpointError, DataError, ModelError, RecipeError, TrainingError
from slimkit.models import build_model, load_checkpoint
from slimkit.recipe import parse_recipe
from slimkit.recipe.chains import resolve_steps
from slimkit.tasks.detection.settings import BoxAugmentSettings, DetectionDataSettings
from slimkit.tasks.detection.task import DetectionTask
from slimkit.train import TrainSettings, fit

STILL = BoxAugmentSettings(flip=0, scale=None, colour=0)
SETTINGS = TrainSettings(epochs=2, lr=0.001, optimizer="adamw", precision="fp32")


def folder(root: Path, boxes: list[list[float]], count: int = 4) -> Path:
    """``count`` images per split, 64×48; the first ones have a box each."""
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        for number in range(count):
            image = Image.effect_noise((64, 48), 40 + number)
            image.convert("RGB").save(root / "images" / split / f"{split}{number}.png")
        content = {
            "images": [
                {"id": n, "file_name": f"{split}{n}.png", "width": 64, "height": 48}
                for n in range(count)
            ],
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "other"}],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 1, "bbox": box, "area": box[2] * box[3]}
                for n, box in enumerate(boxes)
            ],
        }
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def loaded(root: Path, **more: Any) -> Any:
    settings = DetectionDataSettings(
        source=f"coco:{root}", image_size=64, batch_size=2, augment=STILL, validation=0, **more
    )
    return DetectionTask().load(settings)


class Overflowing(TinyDetector):
    """Its loss is not a number for images that are bright on the whole."""

    def loss(self, predictions: Any, targets: Any, image_size: tuple[int, int]) -> Any:
        losses = super().loss(predictions, targets, image_size)
        if any(target["scene"].name == "train2.png" for target in targets) and self.armed:
            losses["giou"] = losses["giou"] * float("nan")
        return losses

    armed = False


def test_a_loss_that_is_not_a_number_names_the_images_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    splits = loaded(folder(tmp_path / "data", [[5, 5, 20, 20]] * 4))
    model = Overflowing(2)
    kept = tmp_path / "run.safetensors"

    def epoch_is_over(_: Any) -> dict[str, float]:
        model.armed = True
        return {"map": 0.0}

    with pytest.raises(TrainingError, match=r"the loss is nan at step \d of 4") as raised:
        fit(
            model,
            splits.train,
            batch_loss=DetectionTask().loss,
            settings=SETTINGS,
            evaluate=epoch_is_over,
            checkpoint=kept,
            progress=False,
        )
    assert "in the batch of samples" in str(raised.value)
    assert "train2.png" in str(raised.value)
    assert kept.exists()
    model.armed = False
    again = fit(
        model,
        splits.train,
        batch_loss=DetectionTask().loss,
        settings=SETTINGS,
        evaluate=lambda _: {"map": 0.0},
        checkpoint=kept,
        progress=False,
    )
    assert [record["epoch"] for record in again.epochs] == [0, 1]


@pytest.mark.parametrize("boxes", [[[5.0, 5.0, 20.0, 20.0]], []], ids=["one image", "no image"])
def test_images_and_batches_without_boxes_train(tmp_path: Path, boxes: list[list[float]]) -> None:
    splits = loaded(folder(tmp_path, boxes))
    model = tiny_detector(2)
    before = copy.deepcopy(model.state_dict())
    history = fit(
        model,
        splits.train,
        batch_loss=DetectionTask().loss,
        settings=SETTINGS,
        progress=False,
    )
    assert all(record["loss"] > 0 for record in history.epochs)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert {"body.0.conv.weight", "head.outputs.0.bias"} <= moved


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"])
def test_a_batch_without_any_box_trains_torchvisions_detectors(name: str) -> None:
    from slimkit.inputs import Batch, Inputs

    model = build_model(f"torchvision:{name}", num_classes=3, min_size=64, max_size=64).train()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    batch = Batch(Inputs((list(torch.rand(2, 3, 64, 64)),)), [none, none])
    loss, _ = DetectionTask().loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path, [[5, 5, 20, 20]] * 4)
    broken = root / "images" / "train" / "train1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match=r"train1\.png: the image cannot be read"):
        list(loaded(root).train)


def test_annotations_of_another_data_set_or_without_their_images_are_refused(
    tmp_path: Path,
) -> None:
    root = folder(tmp_path, [[5, 5, 20, 20]] * 4)
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 1, "name": "dog"}]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances_val\.json: its categories are others"):
        loaded(root)
    content["categories"] = [{"id": 1, "name": "cell"}, {"id": 2, "name": "other"}]
    file.write_text(json.dumps(content))
    for image in (root / "images" / "val").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="not one of its images is there"):
        loaded(root)


def test_a_network_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    splits = loaded(folder(tmp_path, [[5, 5, 20, 20]] * 4))
    with pytest.raises(ModelError, match="the model has 10 classes, but the data has 2"):
        DetectionTask().check_head(tiny_detector(10), splits)


def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    write_tensors(file, build_model("slimkit:resnet20", num_classes=10).state_dict())
    model = tiny_detector()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_checkpoint(model, file)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


# ---- the original as the teacher


def small_picodet() -> Any:
    torch.manual_seed(0)
    widths = {"scale": 0.25, "ratios": [0.5] * 13, "neck": 16, "layers": 1}
    return build_model("slimkit:picodet", num_classes=3, **widths)


def retinanet() -> Any:
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 64}
    return build_model("torchvision:retinanet_resnet50_fpn", num_classes=4, **sizes)


def test_features_scores_and_boxes_of_the_original_teach_picodet() -> None:
    student, images = small_picodet().eval(), torch.rand(2, 3, 64, 64)
    losses = DetectionTask().distillation(student)
    assert {loss["type"] for loss in losses} == {"pkd", "quality_kd", "localization_kd"}
    teacher = copy.deepcopy(student)
    with Distiller(student, teacher, losses, example_inputs=images, precision="fp32") as distiller:
        assert float(distiller.loss(images, student(images)).detach()) == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.3)
        value = distiller.loss(images, student(images))
        assert all(float(term) > 0 for term in distiller.last.values())
        value.backward()
    assert all(p.grad is not None for p in student.neck.parameters())


def test_torchvisions_detectors_learn_from_their_original_too() -> None:
    student = retinanet()
    losses = DetectionTask().distillation(student)
    assert [loss["type"] for loss in losses[-2:]] == ["quality_kd", "localization_kd"]
    assert len(losses) == 5 + 2  # levels of the pyramid
    images = list(torch.rand(2, 3, 64, 64))
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    with Distiller(
        student.train(), retinanet(), losses, example_inputs=(images,), precision="fp32"
    ) as distiller:
        own = student(images, [target, target])
        value = distiller.loss((images,), own)
    assert torch.isfinite(value)
    assert isinstance(value, Tensor)
    assert value.requires_grad


VALUES: dict[str, Any] = {
    "name": "taught",
    "task": "detection",
    "data": {"source": "digit-scenes:4"},
    "model": {"name": "tiny_detector:tiny_detector"},
    "stages": {
        "train": {"type": "train", "epochs": 1},
        "prune": {"type": "prune", "ratio": 0.5},
        "recover": {"type": "train", "epochs": 1, "teacher": "original"},
        "qat": {"type": "qat", "epochs": 1, "teacher": "original"},
    },
    "variants": {"small": ["train", "prune", "recover"], "int8": ["train", "qat"]},
}


def test_original_is_what_the_first_compression_of_a_chain_began_with() -> None:
    recipe = parse_recipe(VALUES)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    steps = resolve_steps(recipe)
    assert steps["train", "prune", "recover"].teachers["original"] == ("train",)
    assert steps["train", "qat"].teachers["original"] == ("train",)
    values = {**VALUES, "variants": {"none": ["train", "recover"]}}
    with pytest.raises(RecipeError, match="no stage of train → recover prunes, makes sparse or"):
        parse_recipe(values)
