"""Of settings that exclude each other ``--set`` replaces the one that the recipe has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimkit.cli.main import main
from slimkit.errors import RecipeError
from slimkit.recipe import load_recipe, parse_recipe

VALUES: dict[str, Any] = {
    "name": "targets",
    "data": {"source": "digits"},
    "model": {"name": "slimkit:resnet20"},
    "stages": {
        "train": {"type": "train", "epochs": 1},
        "prune": {"type": "prune", "params": 0.75},
        "learn": {"type": "train", "teacher": "train", "distill": [{"type": "kd"}]},
        "int8": {"type": "ptq", "max_drop": 1.0},
    },
    "variants": {"base": ["train"], "final": ["train", "prune", "learn", "int8"]},
}


@pytest.mark.parametrize(
    ("text", "stage", "gone"),
    [
        ("stages.prune.macs=0.7", "prune", "params"),
        ("stages.prune.latency=0.3", "prune", "params"),
        ("stages.int8.min_sqnr=20", "int8", "max_drop"),
        ("stages.learn.knowledge=['file:answers']", "learn", "teacher"),
    ],
)
def test_the_one_that_is_set_takes_the_place_of_the_other_and_that_is_said(
    text: str, stage: str, gone: str
) -> None:
    told: list[str] = []
    recipe = parse_recipe(VALUES, [text], tell=told.append)
    assert not getattr(recipe.stages[stage], gone)
    was = VALUES["stages"][stage][gone]
    assert told == [f"--set {text} takes the place of stages.{stage}.{gone}={was}"]


def test_two_that_are_both_set_are_still_a_mistake() -> None:
    with pytest.raises(RecipeError, match=r"exactly one of .* got macs and params"):
        parse_recipe(VALUES, ["stages.prune.macs=0.7", "stages.prune.params=0.5"])


def test_nothing_is_replaced_by_null_or_by_another_kind_of_setting() -> None:
    told: list[str] = []
    edits = ["stages.prune.macs=null", "stages.prune.round_to=16"]
    recipe = parse_recipe(VALUES, edits, tell=told.append)
    assert getattr(recipe.stages["prune"], "params") == 0.75  # noqa: B009 - not of every stage
    assert not told


def test_the_target_of_the_quick_start_can_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("quickstart", ["stages.prune.macs=0.7"])
    assert recipe.model_dump()["stages"]["prune"]["params"] is None
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "quickstart", "--set", "stages.prune.macs=0.7", "--set", "name=a/b"]
    assert main(arguments) == 2
    assert main([*arguments[:4], "--dry-run"]) == 0
    assert "takes the place of stages.prune.params=0.75" in capsys.readouterr().err
