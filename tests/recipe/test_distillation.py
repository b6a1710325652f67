"""Every form of distillation from the recipe alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimkit.errors import RecipeError, SlimkitError
from slimkit.recipe import load_recipe, parse_recipe, preview_run, run_recipe
from slimkit.recipe.chains import resolve_steps
from slimkit.recipe.keys import Keys
from slimkit.recipe.loading import dump_recipe
from slimkit.recipe.schema.recipe import recipe_schema

EMBEDDING = {"module": "fc", "part": "input"}


def with_stage(values: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """The recipe with one distilled stage behind training, and a wide teacher."""
    values["teachers"] = {
        "wide": {"name": "tiny_models:tiny", "args": {"width": 24}},
        "wider": {"name": "tiny_models:tiny", "args": {"width": 32}},
    }
    student = {"type": "train", "epochs": 1, "lr": 0.05, "precision": "fp32",
               "teacher_precision": "fp32", **stage}  # fmt: skip
    values["stages"] = {"train": values["stages"]["train"], "student": student}
    values["variants"] = {"final": ["student"]}
    return values


FORMS: dict[str, dict[str, Any]] = {
    "several teachers": {
        "teacher": ["wide", "wider"],
        "distill": [{"type": "kd"}, {"type": "mimic", "student": "bn?", "teachers": ["wide"]}],
    },
    "weighted teachers": {"teacher": {"wide": 0.7, "train": 0.2}, "distill": [{"type": "kd"}]},
    "confident teachers": {
        "teacher": ["wide", "train"],
        "teacher_weighting": "confidence",
        "distill": [{"type": "kd"}, {"type": "l1"}],
    },
    "mutual": {
        "teacher": "wide",
        "teacher_mode": "mutual",
        "distill": [{"type": "kd", "temperature": 1}],
    },
    "self": {
        "teacher": "self",
        "distill": [{"type": "byot", "student": "bn1", "student_deep": EMBEDDING}],
    },
    "no data": {
        "teacher": "train",
        "loss_weight": 0,
        "data_free": {"type": "dafl", "width": 4, "latent": 8},
        "distill": [{"type": "kd"}],
    },
    "labels": {
        "teacher": "train",
        "distill": [{"type": "dkd"}, {"type": "wsld", "schedule": "cosine"}],
    },
    "ids": {
        "teacher": "train",
        "distill": [
            {"type": "crd", "student": EMBEDDING, "samples": 144, "negatives": 32, "size": 8}
        ],
    },
    "stopped": {
        "teacher": "train",
        "epochs": 2,
        "distill": [{"type": "kd", "schedule": {"stop_epoch": 1}}],
    },
    "remembered": {
        "teacher": ["wide", "train"],
        "teacher_cache": 1,
        "distill": [{"type": "kd"}],
    },
    "delivered": {
        "teacher": "train",
        "deliver": ["torch:flatten", {"function": "torch.nn.functional:relu"}],
        "distill": [{"type": "l1"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_runs_every_form(form: str, values: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(with_stage(values, **FORMS[form]))
    assert parse_recipe(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    report = run_recipe(recipe, tmp_path / "run", cache=tmp_path / "cache", smoke=True,
                        progress=False)  # fmt: skip
    (stage,) = report["variants"][0]["stages"]
    assert stage["name"] == "student"
    assert stage["settings"]["distill"][0]["type"] == FORMS[form]["distill"][0]["type"]


EDITS = [
    "distill.0.type=dkd",
    "distill.0.schedule=linear",
    "teacher=[wide, wider]",
    "teacher={wide: 1, wider: 1}",
    "teacher={wide: 1, wider: 0.5}",
    "teacher=wider",
    "teacher_mode=mutual",
    "deliver=['torch:flatten']",
    "data_free={type: dfad}",
]


def test_every_edit_is_another_key(values: dict[str, Any]) -> None:
    """And what is equal but for a teacher's name is the same."""
    base = with_stage(values, teacher="wide", distill=[{"type": "kd"}])
    base["teachers"]["twin"] = base["teachers"]["wide"]

    def key(*edits: str) -> str:
        recipe = parse_recipe(base, [f"stages.student.{edit}" for edit in edits])
        return Keys(recipe, resolve_steps(recipe), "data").chain(("student",))

    keys = {edit: key(edit) for edit in ["seed=0", *EDITS] if edit != "seed=0"}
    assert len({key(), *keys.values()}) == len(keys) + 1
    assert key("teacher=twin") == key()


MISTAKES = [
    ("teacher=[wide, widr]", "stages.student.teacher.1: there is no teacher", "'wide'"),
    ("teacher={widr: 1}", "stages.student.teacher.widr: there is no teacher", "'wide'"),
    ("teacher={wide: -1, train: 1}", "stages.student.teacher.wide", "at least 0"),
    ("teacher=[]", "stages.student.teacher: there is no teacher in it", "name"),
    ("teacher=[wide, self]", "student.teacher: self cannot be one of several", "of: student"),
    ("teacher=3", "stages.student.teacher", "a text"),
    ("teacher_mode=mutal", "stages.student.teacher_mode", "'mutual'"),
    ("teacher_weighting=confidence", "student.teacher_weighting", "needs teachers: several, not 1"),
    ("teacher=[wide, train, wide]", "stages.student.teacher.2: 'wide' is there twice", ""),
    ("deliver=[relu]", "stages.student.deliver.0.function: 'relu' is no import path", "package"),
    ("deliver=['torch:flaten']", "stages.student.deliver", "'flatten'"),
    ("data_free={type: dalf}", "stages.student.data_free.type: unknown", "'dafl'"),
    ("data_free={type: dafl, latnt: 3}", "stages.student.data_free.latnt", "'latent'"),
    ("data_free={type: dafl, features: fk}", "data_free.teacher: the teacher Tiny", "'fc'"),
    ("distill.0.teachers=[wdie]", "distill.0.teachers.0: there is no teacher 'wdie'", "'wide'"),
    ("distill.0.student=con1", "stages.student.distill.0.student: the student Tiny", "'conv1'"),
    ("distill.0.student={module: conv1, part: inputs}", "distill.0.student.part", "'input'"),
    ("distill.0.student={modul: conv1}", "distill.0.student.modul: unknown key", "'module'"),
    ("distill.0.connector=conv", "distill.0.connector: unknown connector 'conv'", "'conv1x1'"),
    ("distill.0.connector={type: conv_bn_act, kernl: 3}", "distill.0.connector.kernl", "'kernel'"),
    (
        "distill.0.connector=[resize, {type: normalize, knid: l2}]",
        "distill.0.connector.1.knid",
        "'kind'",
    ),
    ("teacher_cache=-1", "stages.student.teacher_cache: expected at least 0", ""),
    (
        "deliver=['torch:flatten', {function: 'torch:relu', source: student}]",
        "stages.student.deliver: each network waits",
        "one source",
    ),
    ("distill.0.schedule={shape: linear, stop: 3}", "distill.0.schedule.stop", "'stop_epoch'"),
    ("distill.0={type: crd}", "stages.student.distill.0.samples: this setting is required", ""),
    ("distill.0={type: ofd, student: conv1}", "conv1: the margin of ofd", "batch norm"),
]


@pytest.mark.parametrize(("edit", "message", "hint"), MISTAKES)
def test_a_mistake_names_its_path_and_the_nearest_choice(
    edit: str, message: str, hint: str, values: dict[str, Any], tmp_path: Path
) -> None:
    base = with_stage(values, teacher="wide", distill=[{"type": "mimic", "student": "bn1"}])

    def read() -> None:
        preview_run(parse_recipe(base, [f"stages.student.{edit}"]), smoke=True, cache=tmp_path)

    with pytest.raises(SlimkitError) as caught:
        read()
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_teachers_that_wait_for_their_student_are_found(values: dict[str, Any]) -> None:
    base = with_stage(values, teacher=["wide", "student"], distill=[{"type": "kd"}])
    with pytest.raises(RecipeError, match="a cycle: student waits for student"):
        parse_recipe(base)


def test_a_recipe_on_disk_says_all_of_it_in_short(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = parse_recipe(with_stage(values, **FORMS["delivered"]))
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_the_schema_knows_records_connectors_and_schedules() -> None:
    text = json.dumps(recipe_schema())
    for word in ("WeightSchedule", "conv_bn_act", "data_free", "teacher_weighting", "Record"):
        assert word in text


def test_a_cache_for_augmented_images_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    base = with_stage(values, teacher="wide", teacher_cache=1, distill=[{"type": "kd"}])
    recipe = parse_recipe(base, ["data.augment={flip: true}"])
    with pytest.raises(SlimkitError, match=r"student\.teacher_cache: no sample comes again"):
        preview_run(recipe, smoke=True, cache=tmp_path)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"teacher": {"wide": 1, "train": 1}, "teacher_weighting": "confidence"},
         "student.teacher_weighting: confidence takes the place of weights"),
        ({"teacher": {"wide": 1, "train": 1}, "teacher_mode": "mutual"},
         "student.teacher_mode: networks that learn from each other"),
        ({"teacher": "wide", "teacher_mode": "mutual", "data_free": {"type": "dafl"}},
         "student.teacher_mode: networks that learn from each other"),
        ({"teacher": ["wide", "train"], "data_free": {"type": "dafl"}},
         "student.data_free: data_free needs teachers: one, not 2"),
        ({"teacher": "self", "teacher_mode": "mutual"},
         "student.teacher_mode: teacher_mode needs teachers: one or more, not 0"),
    ],
)  # fmt: skip
def test_forms_that_exclude_each_other_are_refused(
    stage: dict[str, Any], message: str, values: dict[str, Any]
) -> None:
    base = with_stage(values, **stage, distill=[{"type": "kd"}])
    with pytest.raises(RecipeError) as caught:
        parse_recipe(base)
    assert message in str(caught.value)
