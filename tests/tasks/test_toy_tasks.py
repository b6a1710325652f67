"""The task interface is wide enough: a detector and a text classifier go all the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_tasks
import torch

from slimkit.errors import GateError, TaskError
from slimkit.recipe import parse_recipe, preview_run, run_recipe
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


def test_a_detector_goes_from_training_to_a_report(tmp_path: Path) -> None:
    values = recipe("ToyDetection", "toy_detector")
    values["stages"]["train"] |= {"epochs": 12}
    values["stages"]["recover"] |= {"teacher": "unpruned"}
    values["stages"]["recover"]["distill"] = [{"type": "mimic", "student": "backbone.5"}]
    values["require"] = {"metric_drop": 100, "min_metric": 0}
    report = run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)
    first, last = report["variants"]
    print(
        json.dumps({k: v for k, v in report.items() if k not in {"recipe", "drawings"}}, indent=1)[
            :6000
        ]
    )
