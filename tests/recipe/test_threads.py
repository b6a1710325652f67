"""Threads of PyTorch are a recipe's to set, and nobody else's afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimkit.recipe import parse_recipe, run_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.workbench import Workbench


def test_stages_run_with_the_recipes_threads(values: dict[str, Any], tmp_path: Path) -> None:
    seen: list[int] = []
    before = torch.get_num_threads()
    recipe = parse_recipe(values, [f"threads={before + 1}", "variants={a: [train]}"])
    run_recipe(
        recipe,
        tmp_path / "run",
        smoke=True,
        progress=False,
        listener=lambda event: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_results_are_found_again_whatever_the_threads_are(
    values: dict[str, Any], tmp_path: Path
) -> None:
    keys = set()
    for edits in ([], ["threads=3"], ["stages.train.minutes=null"]):
        bench = Workbench(parse_recipe(values, edits), Cache(tmp_path))
        keys.add(bench.keys.stage(("train",)))
    assert len(keys) == 1
    bench = Workbench(parse_recipe(values, ["stages.train.minutes=5"]), Cache(tmp_path))
    assert bench.keys.stage(("train",)) not in keys
