"""The prune stage: what it passes on, what data it sees, how it is resumed and previewed."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import slimkit as sk
from slimkit.cli.narration import Narrator
from slimkit.errors import DataError, PlanError, RecipeError
from slimkit.measure import layer_latency
from slimkit.prune.allocation import sensitivity
from slimkit.prune.latency_target import Bench
from slimkit.recipe import parse_recipe, preview_run, proving, recipe_schema, run_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.stages.interface import StageContext
from slimkit.recipe.stages.pruning import ROUND_TO, PruneStage, TrainingBatches
from slimkit.recipe.workbench import Workbench


@pytest.fixture
def context(values: dict[str, Any], tmp_path: Path) -> StageContext:
    """What a stage gets to see, on real digits."""
    recipe = parse_recipe(values, ["data.eval_batch_size=32"])
    bench = Workbench(recipe, Cache(tmp_path / "cache"))
    step = bench.steps["train", "prune"]
    return replace(bench.context(step, {}, tmp_path / "work"), max_steps=None, progress=False)


@pytest.fixture
def model() -> torch.nn.Module:
    from tiny_models import tiny

    return tiny(width=16)


def channels(extra: Any) -> dict[str, int]:
    return {row["layer"]: row["kept"] for row in extra["channels"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "taylor", "batches": 2},
        {"criterion": {"type": "obd", "per_sample": False}, "batches": 1},
        {"criterion": {"type": "group_fisher", "normalise": "activations"}, "batches": 1},
        {"criterion": {"type": "l2", "members": "all"}, "normalisation": "gaussian"},
        {"allocation": "isomorphic"},
        {"allocation": {"type": "global", "max_fraction": 0.5}},
        {"allocation": {"type": "sensitivity", "ratios": [0.25, 0.5]}},
        {"allocation": {"type": "annealing", "trials": 4}, "evaluate": "metric"},
        {"allocation": {"type": "genetic", "trials": 4, "population": 2, "start": ["global"]}},
        {"ratios": {"conv1": 0.5, "conv2": 0.25}},
        {"equal": [["conv1", "conv2"]], "min_channels": 8},
    ],
    ids=lambda settings: str(next(iter(settings.values()))),
)
def test_every_way_of_choosing_channels_works_in_a_recipe(
    context: StageContext, model: torch.nn.Module, settings: dict[str, Any]
) -> None:
    stage = PruneStage.model_validate(
        {"macs": 0.4, "round_to": 4, "evaluation_batches": 1, **settings}
    )
    again = PruneStage.model_validate(json.loads(json.dumps(stage.model_dump(mode="json"))))
    assert again == stage
    before = sk.profile(model, context.example_inputs).macs
    result = stage.run(model, context)
    assert sk.profile(result.model, context.example_inputs).macs <= 0.6 * before
    (plan,) = result.model.slimkit_plans
    assert str(context.work) not in json.dumps(plan.to_json())


def test_options_reach_the_plan(context: StageContext, model: torch.nn.Module) -> None:
    stage = PruneStage(ratio=0.5, round_to=1, limits={"conv1": (12, None)})
    assert channels(stage.run(model, context).extra) == {"conv1": 12, "conv2": 8, "fc": 10}


def test_a_criterion_sees_training_images_that_the_evaluation_does_not(
    context: StageContext,
) -> None:
    stage = PruneStage(macs=0.5, criterion="taylor", batches=1, evaluation_batches=1)
    batches = stage._criterion(context).batches
    (images,), (again,) = ([b.inputs.args[0] for b in batches] for _ in range(2))
    assert torch.equal(images, again)
    assert batches.role == "train"
    (others,) = [b.inputs.args[0] for b in TrainingBatches(context.splits.calibration, 1)]
    assert len(others) == len(images) == 32
    assert not torch.equal(images, others)


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("settings", [{"criterion": "taylor"}, {"allocation": "sensitivity"}])
def test_other_splits_than_training_are_refused(
    context: StageContext, model: torch.nn.Module, split: str, settings: dict[str, Any]
) -> None:
    loader = context.splits.test
    loader.role = split  # type: ignore[assignment]
    wrong = replace(context, splits=replace(context.splits, calibration=loader))
    with pytest.raises(DataError, match=f"must not see the {split} split"):
        PruneStage.model_validate({"macs": 0.5, **settings}).run(model, wrong)


def test_a_killed_sensitivity_goes_on_where_it_was(
    context: StageContext, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = PruneStage.model_validate(
        {"macs": 0.4, "round_to": 4, "allocation": {"type": "sensitivity", "ratios": [0.25, 0.5]}}
    )
    calls = 0
    evaluate = type(context.task).evaluate

    def counting(self: Any, network: Any, loader: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return evaluate(self, network, loader)

    monkeypatch.setattr(type(context.task), "evaluate", counting)
    with pytest.raises(KeyboardInterrupt):
        stage.run(model, context)
    stage.run(model, context)
    # the network itself and two groups at two ratios, one of them twice; then two known ones
    assert calls == 3 + 3 + 2


def test_steps_prune_a_little_and_train_a_little(
    context: StageContext, model: torch.nn.Module
) -> None:
    stage = PruneStage.model_validate(
        {
            "ratio": 0.5,
            "round_to": 1,
            "steps": 3,
            "schedule": "linear",
            "between": {"epochs": 1, "lr": 0.05, "precision": "fp32"},
        }
    )
    result = stage.run(model, context)
    assert channels(result.extra) == {"conv1": 8, "conv2": 8, "fc": 10}
    assert len(result.model.slimkit_plans) == 3
    assert [row["epoch"] for row in result.extra["history"]] == [0, 1]
    assert result.extra["channels"][0]["total"] == 16
    assert stage.training_epochs() == 2


def test_measured_latency_is_told(
    context: StageContext, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(bench: Bench, kept: Any, repeats: int, seconds: float) -> list[tuple[float, float]]:
        share = bench.space.cost(kept).macs / bench.space.cost().macs
        return [(2.0, 2.0 * (0.8 + 0.2 * share))] * repeats

    monkeypatch.setattr(Bench, "__call__", call)
    events: list[Any] = []
    stage = PruneStage(latency=0.1, round_to=1)
    extra = stage.run(model, replace(context, emit=events.append)).extra
    assert extra["measured"]["backend"] == "onnxruntime"
    assert 1.7 <= extra["measured"]["measured_ms"][1] <= 1.8
    assert extra["warnings"][0].startswith("MACs fell by")
    assert events[-1] == {"event": "warning", "message": extra["warnings"][0]}


def test_a_dry_run_measures_and_evaluates_nothing(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Bench, "__call__", never)
    monkeypatch.setattr(sensitivity, "_values", never)
    monkeypatch.setattr(TrainingBatches, "__iter__", never)
    prune = values["stages"]["prune"]
    del prune["ratio"]
    values["variants"] = {"final": ["train", "prune"]}
    for settings in (
        {"latency": 0.4},
        {"latency": 0.99},
        {"macs": 0.4, "criterion": "taylor", "allocation": {"type": "genetic"}},
        {"macs": 0.4, "allocation": "sensitivity"},
    ):
        values["stages"]["prune"] = {**prune, **settings}
        rows = preview_run(parse_recipe(values), cache=tmp_path).rows
        assert rows[-1].macs < rows[0].macs or settings == {"latency": 0.99}
    values["stages"]["prune"] = {**prune, "macs": 0.999}
    with pytest.raises(PlanError, match=r"stages\.prune\.macs: .*out of reach"):
        preview_run(parse_recipe(values), cache=tmp_path)


def test_the_schema_lists_methods_with_their_settings(values: dict[str, Any]) -> None:
    text = json.dumps(recipe_schema())
    for name in ("taylor", "sensitivity", "genetic", "isomorphic", "group_lasso", "trials"):
        assert f'"{name}"' in text


def test_unpruned_teaches_what_the_first_pruning_began_with(values: dict[str, Any]) -> None:
    values["stages"]["recover"] = {"type": "train", "epochs": 1, "teacher": "unpruned"}
    values["stages"]["more"] = {"type": "prune", "ratio": 0.25}
    values["variants"] = {
        "final": ["train", "prune", "recover", "more", "recover"],
        "at-once": ["prune", "recover"],
    }
    recipe = parse_recipe(values)
    assert recipe.model_dump()["stages"]["recover"]["distill"][0]["type"] == "kd"
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    from slimkit.recipe.chains import resolve_steps

    steps = resolve_steps(recipe)
    assert steps["train", "prune", "recover"].teachers["unpruned"] == ("train",)
    assert steps["train", "prune", "recover", "more", "recover"].teachers["unpruned"] == ("train",)
    assert steps["prune", "recover"].teachers["unpruned"] == ()
    values["variants"]["none"] = ["train", "recover"]
    with pytest.raises(RecipeError, match=r"recover\.teacher: no stage of train → recover prunes"):
        parse_recipe(values)


def test_recovery_and_sparse_training_are_one_word_each(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unrewarded(files: Any, *, macs: Any, ms: Any, backend: str, **_: Any) -> str | None:
        assert all(file.exists() for file in files)
        return f"only {macs[1]} of {macs[0]} MACs and no gain in {backend}"

    monkeypatch.setattr(layer_latency, "unrewarded", unrewarded)
    monkeypatch.setattr(proving, "without_gain", lambda *_: {})  # times of tiny networks are noise
    events: list[Any] = []
    values["stages"]["train"] |= {"sparsity": {"type": "batch_norm_l1", "weight": 0.01}}
    values["stages"]["train"]["epochs"] = 1
    values["stages"]["recover"] = {
        "type": "train",
        "epochs": 1,
        "lr": 0.05,
        "precision": "fp32",
        "teacher": "unpruned",
        "teacher_precision": "fp32",
    }
    values["variants"] = {"baseline": ["train"], "final": ["train", "prune", "recover"]}
    report = run_recipe(
        parse_recipe(values),
        tmp_path / "out",
        cache=tmp_path,
        progress=False,
        listener=events.append,
    )
    first, last = report["variants"]
    assert 0 <= first["stages"][0]["sparsity"] <= 1
    assert last["stages"][-1]["settings"]["teacher"] == "unpruned"
    assert first["warnings"] == []
    (warning,) = last["warnings"]
    assert warning.startswith(f"only {last['cost']['macs']} of {first['cost']['macs']} MACs")
    assert warning in (tmp_path / "out" / "report.html").read_text()
    (told,) = [event for event in events if event["event"] == "warning"]
    assert (told["variant"], told["message"]) == ("final", warning)
    console = Console(file=StringIO(), width=200)
    Narrator(console)(told)
    assert console.file.getvalue() == f"warning  final: {warning}\n"  # type: ignore[attr-defined]


def test_latency_before_a_quantizing_stage_is_that_of_quantized_copies(
    context: StageContext, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def timed(self: Bench, kept: Any, *_: Any) -> list[tuple[float, float]]:
        copy = self.space.measuring["deployed"](self.space.pruned(kept))
        seen.append(type(copy).__name__)
        assert copy.plan.share > 0.9
        share = self.space.cost(kept).macs / self.space.cost().macs
        return [(2.0, 2.0 * (0.8 + 0.2 * share))]

    monkeypatch.setattr(Bench, "__call__", timed)
    PruneStage(latency=0.1, then="int8", round_to=1).run(model, context)
    assert set(seen) == {"QuantizedModel"}


def test_channels_are_rounded_to_what_follows() -> None:
    assert (ROUND_TO[PruneStage(macs=0.5).then], ROUND_TO["int8"]) == (8, 16)
