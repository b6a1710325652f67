"""Detection end to end: a recipe, its file and script, torchvision's detectors, bad models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_detector import tiny_detector
from torch import nn
from torchvision.ops import clip_boxes_to_image

import slimkit as sk
from slimkit.cli.main import main
from slimkit.errors import ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.models import build_model
from slimkit.recipe import parse_recipe, run_recipe
from slimkit.tasks.conformance import check_task
from slimkit.tasks.detection.detectors import Suppression, dense, finder
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.detection.task import DetectionTask

RATIOS = [0.5] * 13
WIDTHS = {"scale": 0.25, "ratios": RATIOS, "neck": 16, "layers": 1}


VALUES: dict[str, Any] = {
    "name": "boxes",
    "task": {"type": "detection", "score": 0.0},
    "data": {"source": "digit-scenes:12", "batch_size": 4, "eval_batch_size": 8, "limit": 8},
    "model": {"name": "tiny_detector:tiny_detector"},
    "stages": {
        "train": {"type": "train", "epochs": 1, "lr": 0.002, "optimizer": "adamw"},
        "prune": {"type": "prune", "ratio": 0.5, "round_to": 4},
        "int8": {"type": "ptq", "batches": 1},
    },
    "variants": {"baseline": ["train"], "small": ["train", "prune", "int8"]},
    "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("detection")
    report = run_recipe(parse_recipe(VALUES), folder, cache=folder / "cache", progress=False)
    return folder, report


def test_the_task_keeps_its_promises() -> None:
    settings = {"source": "digit-scenes:8", "limit": 8, "eval_batch_size": 4}
    check_task("detection", settings, model=tiny_detector())
    check_task("detection", settings, model=tiny_detector(3), smoke=True)


def test_a_recipe_ends_in_average_precision_boxes_and_a_file(
    run: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = run
    baseline, small = report["variants"]
    for variant in (baseline, small):
        assert {"map", "map50", "map75"} <= set(variant["metrics"])
        assert variant["metrics"]["map"] == pytest.approx(variant["torch_metrics"]["map"], abs=1.0)
    assert small["cost"]["bytes"] < 0.5 * baseline["cost"]["bytes"]
    assert small["cost"]["macs"] < 0.7 * baseline["cost"]["macs"]
    kinds = [drawing["kind"] for drawing in report["drawings"]]
    assert kinds == ["samples", "table", "lines"]
    row = report["drawings"][0]["rows"][0]
    assert len(row) == 3
    assert {box["label"] for box in row[0]["boxes"]} <= set("0123456789")
    for variant in (baseline, small):
        interval = variant["evidence"]["metrics"]["map"]
        assert interval["low"] <= variant["metrics"]["map"] <= interval["high"]
    assert set(small["evidence"]["change"]) == {"map"}
    assert "mAP" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_file_and_its_script_answer_as_the_command_does(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    model = folder / "variants" / "baseline" / "model.onnx"
    code = main(["evaluate", str(model), "--data", "digit-scenes:12", "--split", "test"])
    lines = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert code == 0
    assert 0 <= float(lines["mAP"]) <= 100
    picture = tmp_path / "scene.png"
    Image.new("RGB", (90, 70), (60, 90, 120)).save(picture)
    script = folder / "variants" / "baseline" / "predict.py"
    command = [sys.executable, str(script), str(picture), "--score", "0.0", "--out", str(tmp_path)]
    answer = subprocess.run([*command], capture_output=True, text=True, check=True)
    assert answer.stdout.count("scene.png: ") == 100
    first = answer.stdout.splitlines()[0]
    sides = [float(value) for value in first.rpartition(" at ")[2].split(",")]
    assert min(sides) >= 0
    assert sides[2] <= 90
    assert sides[3] <= 70


def test_scores_of_a_split_that_the_source_calls_val(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"{key}={value}" for key, value in WIDTHS.items()]
    given = [part for argument in arguments for part in ("--arg", argument)]
    code = main(["evaluate", "slimkit:picodet", "--data", "digit-scenes:2", *given])
    assert code == 0
    assert capsys.readouterr().out.startswith("mAP 0.")


def images(count: int = 2) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(count, 3, 96, 128)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"])
def test_one_stage_detectors_of_torchvision_find_the_same_without_their_lists(name: str) -> None:
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    torch.manual_seed(0)
    model: Any = build_model(f"torchvision:{name}", num_classes=3, **sizes).eval()
    for parameter in model.head.classification_head.parameters():
        nn.init.normal_(parameter, std=0.3)  # scores that differ
    with torch.no_grad():
        own = model([images()[0]])[0]
        outputs = dense(model)(images(1))
    assert outputs["scores"].shape[-1] == 2
    assert len(own["boxes"]) > 5
    boxes = clip_boxes_to_image(outputs["boxes"][0], (96, 128))
    for box, score, label in zip(own["boxes"], own["scores"], own["labels"] - 1, strict=True):
        if label < 0:  # RetinaNet has a score for background, which no training ever raises
            continue
        off = (boxes - box).abs().amax(1) + (outputs["scores"][0, :, label] - score).abs()
        assert float(off.min()) < 0.05


def test_a_loss_inside_the_model_takes_an_image_without_objects() -> None:
    torch.manual_seed(0)
    model = build_model("torchvision:ssdlite320_mobilenet_v3_large", num_classes=3).train()
    some = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    batch = Batch(Inputs((list(images()),)), [some, none])
    loss, _ = DetectionTask().loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    model.eval()
    with torch.no_grad():
        quiet, _ = DetectionTask().loss(model, batch)
    assert torch.isfinite(quiet)
    assert not model.training


def test_two_stage_detectors_are_evaluated_but_not_written() -> None:
    torch.manual_seed(0)
    model: Any = build_model(
        "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=3, min_size=96,
        max_size=128,
    ).eval()  # fmt: skip
    with torch.no_grad():
        found = finder(model, Suppression())(Inputs((list(images()),)))
    assert len(found) == 2
    with pytest.raises(ModelError, match="cannot be written into a file") as raised:
        dense(model)
    assert "SSDLite" in str(raised.value)


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_model_that_does_not_fit_says_what_is_wrong() -> None:
    task = DetectionTask()
    splits = task.load(DetectionDataSettings(source="digit-scenes:4", limit=2))
    with pytest.raises(ModelError, match="no known detector"):
        task.check_head(Other(), splits)
    with pytest.raises(ModelError, match="has 3 classes, but the data has 10") as raised:
        task.check_head(tiny_detector(3), splits)
    assert "num_classes=10" in str(raised.value)
    ssd = build_model("torchvision:ssdlite320_mobilenet_v3_large", num_classes=10)
    with pytest.raises(ModelError, match="num_classes=11"):
        task.check_head(ssd, splits)


def test_heads_are_not_pruned_and_decoding_stays_float() -> None:
    model, example = tiny_detector().eval(), torch.zeros(1, 3, 64, 64)
    plan = sk.prune.plan(model, example, ratio=0.5, round_to=4)
    sk.apply(model, plan)
    logits, distances = model(example)
    assert (logits.shape[-1], distances.shape[-1]) == (10, 32)
    quantized = sk.quantize.ptq(model, example, calibration=[torch.randn(2, 3, 64, 64)])
    assert not any("decode" in name for name in quantized.quantizers)
