"""The recipes that come with Slimkit run: their stages, on made-up data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from slimkit.recipe import load_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.workbench import Workbench

RECIPES = Path(__file__).parents[2] / "recipes"
CHAINS = {
    "cifar10/mobilenet_v1": ("begin", "distil"),  # an untrained teacher with 56 layers
    "cifar10/qat": None,
}


@pytest.mark.parametrize("name", CHAINS)
def test_stages_run_in_a_smoke_run(name: str, tmp_path: Path) -> None:
    bench = Workbench(load_recipe(RECIPES / f"{name}.yaml"), Cache(tmp_path), smoke=True)
    chain = CHAINS[name] or list(bench.recipe.variants.values())[-1]
    model = bench.result(chain)
    scores = bench.task.evaluate(model, bench.splits.test)
    assert all(math.isfinite(value) for value in scores.values())


def test_every_recipe_is_valid() -> None:
    for path in sorted(RECIPES.rglob("*.yaml")):
        assert load_recipe(path).variants
