"""A network and a recipe so small that a whole run takes seconds."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slimkit.recipe import parse_recipe, run_recipe

MODELS = """\
import torch
from torch import nn
from torch.nn import functional as F


class Tiny(nn.Module):
    def __init__(self, num_classes=10, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def tiny(num_classes=10, width=16):
    return Tiny(num_classes, width)
"""

VALUES: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "image_size": 8, "batch_size": 32, "limit": 160},
    "model": {"name": "tiny_models:tiny"},
    "stages": {
        "train": {"type": "train", "epochs": 3, "lr": 0.1, "ema": 0.9, "precision": "fp32"},
        "prune": {"type": "prune", "ratio": 0.5, "round_to": 4, "batch_norm_reestimation": 2},
        "recover": {
            "type": "train",
            "epochs": 2,
            "lr": 0.05,
            "precision": "fp32",
            "teacher": "train",
            "distill": [{"type": "kd"}],
            "teacher_precision": "fp32",
        },
        "int8": {
            "type": "qat",
            "epochs": 2,
            "lr": 0.01,
            "precision": "fp32",
            "batches": 1,
            "teacher": "train",
            "distill": [{"type": "mimic", "student": "bn2"}],
            "teacher_precision": "fp32",
        },
    },
    "variants": {"baseline": ["train"], "final": ["train", "prune", "recover", "int8"]},
    "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
}


@dataclass(frozen=True)
class FinishedRun:
    """One whole run of the recipe."""

    out: Path
    cache: Path
    report: dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the import path with ``tiny_models.py``."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny_models.py").write_text(MODELS)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> FinishedRun:
    """A run of the unchanged recipe that nobody disturbed."""
    out, cache = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cache")
    report = run_recipe(parse_recipe(VALUES), out, cache=cache, progress=False)
    return FinishedRun(out, cache, report)


@pytest.fixture
def values() -> dict[str, Any]:
    """A valid recipe, to be changed freely."""
    return copy.deepcopy(VALUES)


@pytest.fixture
def comparable() -> Callable[[Any], Any]:
    """A report without what may differ between equal runs: times, cached flags, latency."""
    times = {"seconds", "images_per_second", "cached", "latency", "environment", "precision_ms"}
    times |= {"warnings", "cpu_share"}  # of measured times

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in times}
        if isinstance(value, list):
            return [strip(item) for item in value]
        return value

    return strip
