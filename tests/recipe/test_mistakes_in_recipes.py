"""Every mistake in a recipe is answered with its path and the nearest valid choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimkit.errors import RecipeError, SlimkitError
from slimkit.recipe import load_recipe, parse_recipe, preview_run

MISTAKES = [
    ("stages.train.lrr=1", "stages.train.lrr: unknown key 'lrr'", "'lr'"),
    ("stages.prune.criterion=l3", "stages.prune.criterion: unknown criterion 'l3'", "'l1'"),
    ("stages.prune.allocation=unifrom", "stages.prune.allocation: unknown", "'uniform'"),
    ("stages.prune.ratio=1.2", "stages.prune.ratio: expected less than 1, got 1.2", ""),
    ("stages.prune.ratio=null", "stages.prune: expected exactly one of ratio, macs, params", ""),
    ("stages.prune.allocation=[a]", "stages.prune.allocation: expected the name of a", "uniform"),
    ("stages.prune.allocation={type: sensitivty}", "allocation.type: unknown", "'sensitivity'"),
    (
        "stages.prune.allocation={type: sensitivity, ratio: [1]}",
        "stages.prune.allocation.ratio: unknown key 'ratio'",
        "'ratios'",
    ),
    (
        "stages.prune.allocation={type: genetic, trials: many}",
        "stages.prune.allocation.trials: expected a whole number, got 'many'",
        "",
    ),
    ("stages.prune.criterion=tailor", "stages.prune.criterion: unknown", "'taylor'"),
    ("stages.prune.criterion={type: l2, member: all}", "criterion.member: unknown", "'members'"),
    ("stages.prune.criterion={type: l2, members: al}", "criterion.members: expected", "'all'"),
    ("stages.prune.ratios={conv1: 2}", "stages.prune.ratios.conv1: expected at most 1", ""),
    ("stages.prune.limits={conv1: [0, 8]}", "prune.limits.conv1.0: expected at least 1", ""),
    ("stages.prune.backend=onnx", "stages.prune.backend: unknown backend", "'onnxruntime'"),
    ("stages.prune.steps=3", "stages.prune.steps: steps needs between", "epochs"),
    ("stages.prune.between={lrr: 1}", "stages.prune.between.lrr: unknown key", "'lr'"),
    ("stages.train.sparsity={type: lasso}", "train.sparsity.type: unknown", "'group_lasso'"),
    ("stages.train.sparsity={type: group_lasso, wieght: 1}", "sparsity.wieght", "'weight'"),
    ("stages.prune.type=prun", "stages.prune.type: unknown stage type 'prun'", "'prune'"),
    ("stages.train.epochs=many", "stages.train.epochs: expected a number, got 'many'", ""),
    ("stages.train.schedule=cosin", "stages.train.schedule: expected 'cosine'", "'cosine'"),
    ("stages.recover.teacher=trian", "stages.recover.teacher: there is no teacher", "'train'"),
    ("stages.recover.distill=[]", "stages.recover.distill: there is a teacher but no loss", "kd"),
    ("stages.recover.distill.0.type=dk", "stages.recover.distill.0.type: unknown", "'kd'"),
    ("stages.recover.distill.0.temperatur=2", "distill.0.temperatur: unknown", "'temperature'"),
    ("stages.int8.observer=minmix", "stages.int8.observer: unknown observer", "'minmax'"),
    ("stages.int8.observer={type: percentil}", "observer.type: unknown", "'percentile'"),
    (
        "stages.int8.observer={type: mse, percentile: 9}",
        "observer.percentile: unknown",
        "per_example",
    ),
    ("stages.int8.observer={type: kl, bins: 48}", "observer.bins: 48 is not a power of two", ""),
    ("stages.int8.granularity=row", "stages.int8.granularity: expected 'channel', 'tensor' or", ""),
    ("variants.final=[train, purne]", "variants.final.1: there is no stage 'purne'", "'prune'"),
    ("variants={}", "variants: it is empty", ""),
    ("data.image_sise=8", "data.image_sise: unknown key", "'image_size'"),
    ("data.validation=1.5", "data.validation: expected less than 1, got 1.5", ""),
    ("measure.backends=[{name: onnxrutime}]", "measure.backends.0.name: unknown", "'onnxruntime'"),
    ("require.accuracy_dorp=1", "require.accuracy_dorp: unknown key", "'accuracy_drop'"),
    ("seed=many", "seed: expected a whole number, got 'many'", ""),
    ("name=a/b", "name: 'a/b' is not a name", ""),
    ("task=clasification", "task: unknown task 'clasification'", "'classification'"),
    ("task={type: clasification}", "task.type: unknown task", "'classification'"),
    ("task={type: classification, label_smoothin: 1}", "task.label_smoothin", "'label_smoothing'"),
    ("task=slimkit.tasks:Metric", "task: slimkit.tasks:Metric is not a settings class", ""),
    ("data=digits", "data: expected a mapping", ""),
    ("require.min_metric=150", "require.min_metric: accuracy is within 0 … 100, got 150", ""),
    ("stages.purne.ratio=0.5", "--set stages.purne.ratio: stages has no 'purne'", "'prune'"),
    ("stage.prune.ratio=0.5", "--set stage.prune.ratio: there is no key 'stage'", "'stages'"),
    ("stages.recover.distill.3.type=kd", "stages.recover.distill has entries 0 to 0", ""),
    ("seed.x.y=1", "seed is 0, it has no keys", ""),
    ("stages.train", "--set: expected path=value", ""),
]


@pytest.mark.parametrize(("override", "message", "hint"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_with_its_path_and_the_nearest_choice(
    values: dict[str, Any], override: str, message: str, hint: str
) -> None:
    values["seed"] = 0
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, [override])
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_all_mistakes_are_told_at_once(values: dict[str, Any]) -> None:
    overrides = ["stages.train.lrr=1", "data.sauce=x", "stages.prune.ratio=2", "seed=-1"]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, overrides)
    text = str(caught.value)
    assert "4 mistakes" in text
    for path in ("stages.train.lrr", "data.sauce", "stages.prune.ratio", "seed"):
        assert f"\n  {path}: " in text


def test_a_stage_cannot_wait_for_its_own_result(values: dict[str, Any]) -> None:
    values["stages"]["train"] |= {"teacher": "recover", "distill": [{"type": "kd"}]}
    with pytest.raises(RecipeError, match=r"a cycle: .*train waits for recover|recover waits for"):
        parse_recipe(values)


def test_a_teacher_with_two_results_is_ambiguous(values: dict[str, Any]) -> None:
    values["variants"]["other"] = ["prune", "recover"]
    values["stages"]["late"] = values["stages"]["recover"] | {"teacher": "prune"}
    values["variants"]["last"] = ["train", "late"]
    with pytest.raises(RecipeError, match="'prune' has several results: train → prune and prune"):
        parse_recipe(values)


def test_yaml_that_cannot_be_read_is_an_error_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: a\ndata: {source: digits\nmodel: x\n")
    with pytest.raises(RecipeError, match=r"bad\.yaml:3:"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(RecipeError, match="the key 'name' is there twice"):
        load_recipe(tmp_path / "twice.yaml")
    with pytest.raises(RecipeError, match=r"there is no such recipe.*bad\.yaml"):
        load_recipe(tmp_path / "bat.yaml")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        parse_recipe(["name"])


FOUND_LATER = [
    ("model.name=tiny_models:tny", "model.name: tiny_models has no attribute 'tny'"),
    ("model.args={widht: 8}", "model.name: the factory refuses"),
    ("model.args={num_classes: 7}", "model: .*but the data has 10 classes"),
    ("model.checkpoint=nowhere.safetensors", "model.checkpoint: .*nowhere"),
    ("stages.prune.ignore=[conv9]", "stages.prune.ignore: the pattern 'conv9' matches no"),
    ("stages.int8.skip=[fcc]", "stages.int8.skip: the pattern 'fcc' matches no"),
    ("data.source=digts", "data.source: unknown data source 'digts'"),
    ("data.source=parquet:nowhere", "data.source: there is no folder"),
]


@pytest.mark.parametrize(("override", "message"), FOUND_LATER, ids=[m[0] for m in FOUND_LATER])
def test_what_only_the_network_or_the_data_can_tell_is_found_before_training(
    values: dict[str, Any], tmp_path: Path, override: str, message: str
) -> None:
    recipe = parse_recipe(values, [override])
    with pytest.raises(SlimkitError, match=message):
        preview_run(recipe, cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "stages").exists()
