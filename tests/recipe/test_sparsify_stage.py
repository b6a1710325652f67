"""``type: sparsify``: zeros are made, kept by every later stage, and reported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from slimkit.artifact import read_tensors
from slimkit.errors import RecipeError
from slimkit.recipe import parse_recipe, run_recipe


def recipe(values: dict[str, Any], **stage: Any) -> dict[str, Any]:
    made = copy.deepcopy(values)
    quick = {"epochs": 1, "lr": 0.02, "precision": "fp32"}
    made["stages"] = {
        "train": {"type": "train", **quick},
        "sparse": {"type": "sparsify", "sparsity": 0.75, **quick, **stage},
        "tune": {"type": "train", **quick},
        "int8": {"type": "qat", "batches": 1, **quick},
    }
    made["variants"] = {
        "baseline": ["train"],
        "sparse": ["train", "sparse"],
        "sparse-int8": ["train", "sparse", "tune", "int8"],
    }
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "unpruned", "distill": [{"type": "kd"}], "ema": 0.9},
        {"method": "one-shot", "scope": "global"},
    ],
)
def test_zeros_survive_every_later_stage_and_the_export(
    tmp_path: Path, model_folder: Path, values: dict[str, Any], options: dict[str, Any]
) -> None:
    report = run_recipe(
        parse_recipe(recipe(values, **options)),
        tmp_path / "out",
        cache=tmp_path / "cache",
        progress=False,
    )
    sparse, int8 = report["variants"][1:]
    table = next(stage for stage in sparse["stages"] if stage["type"] == "sparsify")["zeros"]
    zeros, weights = (sum(row[key] for row in table) for key in ("zeros", "weights"))
    assert zeros / weights == pytest.approx(0.75, abs=0.03)
    assert sparse["cost"]["nonzero_params"] < 0.5 * sparse["cost"]["params"]

    kept = read_tensors(tmp_path / "out/variants/sparse/model/weights.safetensors")["conv2.weight"]
    final = read_tensors(tmp_path / "out/variants/sparse-int8/model/weights.safetensors")
    name = next(each for each in final if each.endswith("conv2.weight"))
    assert torch.equal(final[name] == 0, kept == 0)
    file = onnx.load(str(tmp_path / "out/variants/sparse-int8/model.onnx"))
    stored = [numpy_helper.to_array(each) for each in file.graph.initializer]
    exported = [each for each in stored if each.shape == tuple(kept.shape)]
    assert any((torch.from_numpy(each.copy()) == 0)[kept == 0].all() for each in exported)
    assert int8["cost"]["nonzero_params"] <= sparse["cost"]["nonzero_params"] * 1.2


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.1}, "initial"),
        ({"stable": 0.6, "pruning": 0.6}, "pruning"),
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "half"}, "pattern"),
        ({"pattern": "2:4"}, "sparsity"),
        ({"method": "oneshot"}, "method"),
    ],
)
def test_mistakes_name_their_field(
    model_folder: Path, values: dict[str, Any], stage: dict[str, Any], place: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(values, **stage))
    assert f"stages.sparse.{place}" in str(caught.value)
