"""A stage that leaves several networks: chains and teachers name one of them, ``search.small``."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field
from torch import nn

import slimkit as sk
from slimkit.errors import CheckpointError, RecipeError, SlimkitError
from slimkit.recipe import (
    STAGES,
    Stage,
    StageContext,
    StageResult,
    dump_recipe,
    parse_recipe,
    preview_run,
    recipe_schema,
    run_recipe,
)
from slimkit.recipe.cache import Cache
from slimkit.recipe.stages.knowledge import recipe_teacher
from slimkit.recipe.workbench import Workbench


class Front(Stage):
    """Leaves the network pruned in several ways, as a search leaves a front."""

    type: Literal["front"] = "front"
    ratios: Mapping[str, float] = Field(default={"small": 0.75, "large": 0.25})
    chosen: str | None = None

    def parts(self) -> tuple[str, ...]:
        return tuple(self.ratios)

    def default_part(self) -> str | None:
        return self.chosen

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        facts = {name: {"channels": self._channels(ratio)} for name, ratio in self.ratios.items()}
        return StageResult(models=self._front(model, context), extra={"trials": 3, "models": facts})

    def preview(self, model: nn.Module, context: StageContext) -> Mapping[str, nn.Module]:
        return self._front(model, context)

    def _front(self, model: nn.Module, context: StageContext) -> dict[str, nn.Module]:
        found = {}
        for name, ratio in self.ratios.items():
            network = copy.deepcopy(model).eval()
            plan = sk.prune.plan(network, context.example_inputs, ratio=ratio, round_to=1)
            found[name] = sk.apply(network, plan)
        return found

    @staticmethod
    def _channels(ratio: float) -> list[dict[str, Any]]:
        return [{"layer": "conv1", "kept": round(16 * (1 - ratio)), "total": 16}]


@pytest.fixture(autouse=True)
def _registered() -> Any:
    with STAGES.scratch():
        STAGES.register("front")(Front)
        yield


@pytest.fixture
def recipe(values: dict[str, Any]) -> dict[str, Any]:
    train = {"type": "train", "epochs": 1, "precision": "fp32", "teacher_precision": "fp32"}
    values["stages"] = {
        "train": train,
        "search": {"type": "front"},
        "recover": {**train, "teacher": "search.large", "distill": [{"type": "kd"}]},
    }
    values["variants"] = {
        "baseline": ["train"],
        "large": ["train", "search.large"],
        "small": ["train", "search.small", "recover"],
    }
    return values


def test_a_recipe_goes_on_with_each_network_of_a_front(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    rows = preview_run(parse_recipe(recipe), cache=tmp_path / "cache").rows
    searched = {row.stage: row for row in rows if row.type == "front"}
    assert searched["search.small"].params < searched["search.large"].params < rows[0].params
    assert [searched[f"search.{name}"].shared for name in ("large", "small")] == [False, True]

    events: list[Mapping[str, Any]] = []
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments: dict[str, Any] = {"cache": cache, "progress": False, "listener": events.append}
    report = run_recipe(parse_recipe(recipe), out, **arguments)
    started = [event["stage"] for event in events if event["event"] == "start"]
    assert started == ["train", "search", "recover"]
    variants = {variant["name"]: variant for variant in report["variants"]}
    params = {name: variant["cost"]["params"] for name, variant in variants.items()}
    assert params["large"] == searched["search.large"].params
    assert params["small"] == searched["search.small"].params
    stages = {
        name: variant["stages"][1] for name, variant in variants.items() if name != "baseline"
    }
    assert [stages[name]["name"] for name in ("large", "small")] == ["search.large", "search.small"]
    assert [stages[name]["channels"][0]["kept"] for name in ("large", "small")] == [12, 4]
    assert {stage["trials"] for stage in stages.values()} == {3}
    assert all("models" not in stage for stage in stages.values())
    page = (out / "report.html").read_text()
    assert "search.small" in page

    events.clear()
    again = run_recipe(parse_recipe(recipe), tmp_path / "again", **arguments)
    assert not [event for event in events if event["event"] == "start"]
    assert all(stage["cached"] for v in again["variants"] for stage in v["stages"])
    for name in variants:
        written = [
            folder / "variants" / name / "model.onnx" for folder in (out, tmp_path / "again")
        ]
        assert written[0].read_bytes() == written[1].read_bytes()

    # one of the networks is damaged: the stage runs again, and leaves both
    key = next(event["key"] for event in events if event.get("stage") == "search")
    weights = Cache(cache).model_folder(key, "small") / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:80])
    events.clear()
    bench = Workbench(parse_recipe(recipe), Cache(cache), emit=events.append)
    for name in ("small", "large"):
        bench.result(("train", f"search.{name}"))
    kinds = [event["event"] for event in events if event.get("stage") == "search"]
    assert kinds == ["cached", "damaged", "start", "end"]


def test_the_part_decides_the_key_and_not_how_it_is_written(recipe: dict[str, Any]) -> None:
    def keys(values: dict[str, Any]) -> list[str]:
        bench = Workbench(parse_recipe(values), Cache(), smoke=True)
        return [bench.keys.chain(chain) for chain in bench.recipe.variants.values()]

    recipe["stages"]["search"]["chosen"] = "small"
    recipe["variants"] = {
        "a": ["train", "search.small"],
        "b": ["train", "search"],
        "c": ["train", "search.large"],
    }
    found = keys(recipe)
    assert found[0] == found[1] != found[2]
    assert "search.small" in dump_recipe(parse_recipe(recipe))
    assert parse_recipe(recipe).variants["b"] == ("train", "search.small")


MISTAKES = [
    (
        ["variants.small=[train, search]"],
        r"variants\.small\.1: search leaves several networks \(write search.small or search.l",
    ),
    (["variants.small=[train, search.smal]"], r"variants\.small\.1: .*'smal'.*'search\.small'"),
    (["variants.small=[train, serch.small]"], r"no stage 'serch\.small'.*'search\.small'"),
    (["variants.small=[train.small]"], r"variants\.small\.0: train leaves one.*write train"),
    (["stages.recover.teacher=search"], r"stages\.recover\.teacher: search leaves several"),
    (["stages.recover.teacher=search.lage"], r"stages\.recover\.teacher: .*'search\.large'"),
    (["stages.recover.teacher=[train, serch.large]"], r"recover\.teacher\.1: .*'search\.large'"),
    (
        ["stages.search.ratios={a.b: 0.5}", "variants.small=[]"],
        r"stages\.search: 'a\.b' is no name",
    ),
    (["stages.search.chosen=medium"], r"stages\.search: its default part 'medium' is none of"),
    (["variants.baseline=[search.small, search.large, train]"], "recover.teacher.*several results"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[str(m[0][0]) for m in MISTAKES])
def test_mistakes_name_path_and_parts(
    recipe: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe, overrides)


def test_the_schema_says_what_a_link_looks_like(recipe: dict[str, Any]) -> None:
    (chains,) = recipe_schema()["properties"]["variants"]["patternProperties"].values()
    links = chains["items"]
    assert re.match(links["pattern"], "search.small")
    assert not re.match(links["pattern"], "search.small.more")


def test_several_networks_of_a_front_teach_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    teachers = ["search.large", "search.small", "train"]
    recipe["stages"]["recover"] |= {"teacher": teachers, "teacher_mode": "mutual"}
    recipe["variants"] = {"final": ["train", "search.small", "recover"]}
    bench = Workbench(parse_recipe(recipe), Cache(tmp_path), smoke=True)
    bench.result(("train", "search.small", "recover"))
    loss = {"type": "kd", "teachers": ["search.large"]}
    recipe["stages"]["recover"] |= {"teacher_mode": "frozen", "distill": [loss, {"type": "kd"}]}
    bench = Workbench(parse_recipe(recipe), Cache(tmp_path), smoke=True)
    bench.result(("train", "search.small", "recover"))


def test_a_network_of_a_front_that_no_variant_has_can_teach_elsewhere(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMKIT_CACHE", str(tmp_path))
    recipe["variants"] = {"final": ["search.large"]}
    teacher = recipe_teacher(parse_recipe(recipe), "search.small", keys=["bn2"])
    assert [key.shape[0] for key in teacher.schema.keys] == [4]
    with pytest.raises(RecipeError, match=r"leaves several networks \(write search"):
        recipe_teacher(parse_recipe(recipe), "search")


def test_what_a_stage_leaves_is_what_it_announced(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Workbench(parse_recipe(recipe), Cache(tmp_path), smoke=True)

    def leave(result: Any) -> None:
        monkeypatch.setattr(Front, "run", lambda self, model, context: result(model))
        bench.result(("train", "search.small"))

    with pytest.raises(SlimkitError, match=r"stages\.search: it left one network, and parts\(\) "):
        leave(StageResult)
    with pytest.raises(SlimkitError, match="left small, and parts"):
        leave(lambda model: StageResult(models={"small": model}))
    with pytest.raises(SlimkitError, match="here are neither"):
        leave(lambda model: StageResult())
    with pytest.raises(SlimkitError, match="here are both"):
        leave(lambda model: StageResult(model, models={"small": model}))
    assert bench.cache.find(bench.keys.stage(("train", "search.small"))) is None


class Unfinished(Stage):
    type: Literal["unfinished"] = "unfinished"


def test_a_stage_that_does_not_say_what_it_does_is_told_so(recipe: dict[str, Any]) -> None:
    with STAGES.scratch():
        STAGES.register("unfinished")(Unfinished)
        with pytest.raises(RecipeError, match=r"stages\.search\.type: unfinished has no run"):
            parse_recipe(recipe, ["stages.search={type: unfinished}"])


def test_a_stage_that_fails_with_a_checkpoint_error_of_its_own_runs_once(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[str]] = []

    def run(stage: Front, model: nn.Module, context: StageContext) -> StageResult:
        assert context.work is not None
        runs.append([path.name for path in context.work.iterdir()])
        (context.work / "training.safetensors").write_text("")
        raise CheckpointError("the weights do not fit", where="teacher.bin")

    monkeypatch.setattr(Front, "run", run)
    events: list[Mapping[str, Any]] = []
    bench = Workbench(parse_recipe(recipe), Cache(tmp_path), smoke=True, emit=events.append)
    chain = ("train", "search.small")
    with pytest.raises(CheckpointError, match=r"stages\.search: teacher\.bin: the weights do not"):
        bench.result(chain)
    assert runs == [[]]
    # now there is a checkpoint of an interrupted run: it may be that which does not fit
    with pytest.raises(CheckpointError, match="the weights do not"):
        bench.result(chain)
    assert runs == [[], ["training.safetensors"], []]
    assert [event["event"] for event in events].count("restart") == 1
