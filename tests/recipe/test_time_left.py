"""What is left of a run is told by the speed so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimkit.cli.narration import Narrator
from slimkit.recipe import parse_recipe, run_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.preview import time_left
from slimkit.recipe.workbench import Workbench


def test_work_that_is_left_takes_as_long_in_proportion(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["stages"]["more"] = {**values["stages"]["train"], "epochs": 6}
    values["variants"] = {"a": ["train"], "b": ["train", "more"]}
    bench = Workbench(parse_recipe(values), Cache(tmp_path))
    assert time_left(bench) == (2, None)
    record = bench.record(("train",))
    count, seconds = time_left(bench)
    assert count == 1
    assert seconds == pytest.approx(2 * record.seconds)  # six epochs after three


def test_a_run_tells_it_after_a_long_stage(
    values: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slimkit.recipe.runner.LONG_STAGE", 0.0)
    events: list[Any] = []
    values["variants"] = {"b": ["train", "prune"]}
    recipe = parse_recipe(values)
    run_recipe(
        recipe, tmp_path / "out", cache=tmp_path / "c", progress=False, listener=events.append
    )
    (left,) = [event for event in events if event["event"] == "left"]
    assert left["stages"] == 1
    lines: list[str] = []
    console: Any = type("Lines", (), {"print": lambda _, text: lines.append(str(text))})()
    Narrator(console)({**left, "seconds": 600.0})
    assert lines == ["left     about 10 min for 1 stage, by the speed so far; then the report"]
