"""The recipes that come with Slimkit pass ``--smoke``, on made-up data and without any file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from slimkit.cli.main import main
from slimkit.recipe import load_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.workbench import Workbench

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(
    path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")
)
SMALL = ["data.batch_size=4", "data.eval_batch_size=4"]


def small(name: str) -> list[str]:
    """Overrides that make a smoke run quick."""
    size = 64 if name.startswith("detection/") else 32
    return [*SMALL, f"data.image_size={size}"]


@pytest.fixture(autouse=True)
def _no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLIMKIT_DATA", "SLIMKIT_CHECKPOINTS"):
        monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_in_a_smoke_run(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml", small(name))
    bench = Workbench(recipe, Cache(tmp_path), smoke=True)
    for chain in bench.recipe.variants.values():
        scores = bench.task.evaluate(bench.result(chain), bench.splits.test)
        assert all(math.isfinite(value) for value in scores.values())


def test_a_smoke_run_ends_with_its_report(tmp_path: Path) -> None:
    """One of them here, since an export takes seconds a variant; ``make smoke`` runs them all."""
    name = "cifar10/mobilenet_v1"
    first, *_, last = load_recipe(name).variants.items()
    only = {variant: list(chain) for variant, chain in (first, last)}
    quick = [f"variants={only}", "measure.seconds=0.02", "measure.parity_batches=1"]
    edits = [part for edit in [*small(name), *quick] for part in ("--set", edit)]
    assert main(["run", name, "--smoke", "--quiet", "--out", "out", *edits]) == 0
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_needs_something_says_what_from_where_and_how_long_it_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(name)
    kind, _, folder = getattr(recipe.data, "source", "").partition(":")
    files = [recipe.model.checkpoint, *(t.checkpoint for t in recipe.teachers.values())]
    wanted = {*filter(None, files)} | (
        {folder} if kind not in {"digits", "digit-scenes", "digit-masks"} else set()
    )
    assert wanted <= set(recipe.needs)
    if wanted:
        assert recipe.takes
        assert main(["run", name, "--dry-run"]) == 2
        told = capsys.readouterr().err
        assert all(f"{thing}: {recipe.needs[thing]}" in told for thing in wanted)
        assert recipe.takes in told


def test_no_recipe_has_a_path_of_somebodys_machine() -> None:
    for path in RECIPES.rglob("*.yaml"):
        assert "../" not in path.read_text(encoding="utf-8")
