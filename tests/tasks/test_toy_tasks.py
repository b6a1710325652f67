"""The task interface is wide enough: a detector and a text classifier go all the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_tasks import toy_detector, toy_text

import slimkit as sk
from slimkit.errors import GateError
from slimkit.recipe import parse_recipe, run_recipe
from slimkit.tasks import ClassificationTask
from slimkit.tasks.conformance import check_task

STAGES: dict[str, Any] = {
    "train": {"type": "train", "epochs": 3, "lr": 0.05, "precision": "fp32"},
    "prune": {"type": "prune", "ratio": 0.5, "round_to": 4, "batch_norm_reestimation": 2},
    "recover": {"type": "train", "epochs": 2, "lr": 0.05, "precision": "fp32"},
    "int8": {"type": "ptq", "batches": 2},
}
VARIANTS = {"baseline": ["train"], "final": ["train", "prune", "recover", "int8"]}


def recipe(task: str, model: str, **changes: Any) -> dict[str, Any]:
    """All kinds of stages on one of the toys."""
    return {
        "name": "toy",
        "task": f"toy_tasks:{task}",
        "data": {"count": 128},
        "model": {"name": f"toy_tasks:{model}"},
        "stages": {name: dict(stage) for name, stage in STAGES.items()},
        "variants": VARIANTS,
        "measure": {"seconds": 0.02, "parity_batches": 1},
        **changes,
    }


def test_all_three_tasks_keep_their_promises() -> None:
    torch.manual_seed(0)
    check_task("toy_tasks:ToyDetection", {"count": 32}, model=toy_detector())
    check_task("toy_tasks:ToyTextClassification", {"count": 32}, model=toy_text(), smoke=True)
    network = sk.build_model("slimkit:resnet20", in_channels=1)
    check_task(ClassificationTask(), {"limit": 64, "eval_batch_size": 16}, model=network)


def test_a_text_classifier_goes_from_training_to_a_report(tmp_path: Path) -> None:
    values = recipe("ToyTextClassification", "toy_text")
    values["require"] = {"metric_drop": 0.5, "min_metric": 0.4, "params_ratio": 0.01}
    with pytest.raises(GateError, match=r"params_ratio is .* required is at most 0\.01"):
        run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)


def test_a_detector_goes_from_training_to_a_report(tmp_path: Path) -> None:
    values = recipe("ToyDetection", "toy_detector")
    values["stages"]["train"] |= {"epochs": 12}
    values["stages"]["recover"] |= {"teacher": "unpruned"}
    values["stages"]["recover"]["distill"] = [{"type": "mimic", "student": "backbone.5"}]
    values["require"] = {"metric_drop": 100, "min_metric": 0}
    report = run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)
    first, last = report["variants"]
    assert first["metrics"]["map"] > 50
