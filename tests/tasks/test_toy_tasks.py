"""The task interface is wide enough: a detector and a text classifier go all the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from toy_tasks import ToyTextClassification, toy_detector, toy_text

import slimkit as sk
from slimkit.errors import GateError, RecipeError, TaskError
from slimkit.recipe import parse_recipe, preview_run, run_recipe
from slimkit.tasks import ClassificationTask, SampleLoader, Task
from slimkit.tasks.conformance import check_task

STAGES: dict[str, Any] = {
    "train": {"type": "train", "epochs": 3, "lr": 0.05, "precision": "fp32"},
    "prune": {"type": "prune", "ratio": 0.5, "round_to": 4, "batch_norm_reestimation": 2},
    "recover": {"type": "train", "epochs": 2, "lr": 0.05, "precision": "fp32"},
    "int8": {"type": "ptq", "batches": 2},
}
VARIANTS = {"baseline": ["train"], "final": ["train", "prune", "recover", "int8"]}


def recipe(task: str, model: str, **changes: Any) -> dict[str, Any]:
    """All kinds of stages on one of the toys."""
    return {
        "name": "toy",
        "task": f"toy_tasks:{task}",
        "data": {"count": 128},
        "model": {"name": f"toy_tasks:{model}"},
        "stages": {name: dict(stage) for name, stage in STAGES.items()},
        "variants": VARIANTS,
        "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
        **changes,
    }


def test_all_three_tasks_keep_their_promises() -> None:
    torch.manual_seed(0)
    check_task("toy_tasks:ToyDetection", {"count": 32}, model=toy_detector())
    check_task("toy_tasks:ToyTextClassification", {"count": 32}, model=toy_text(), smoke=True)
    network = sk.build_model("slimkit:resnet20", in_channels=1)
    check_task(ClassificationTask(), {"limit": 64, "eval_batch_size": 16}, model=network)


def test_a_text_classifier_goes_from_training_to_a_report(tmp_path: Path) -> None:
    values = recipe("ToyTextClassification", "toy_text")
    values["require"] = {"metric_drop": 0.5, "min_metric": 0.4, "params_ratio": 0.01}
    with pytest.raises(GateError, match=r"params_ratio is .* required is at most 0\.01"):
        run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)


def test_a_detector_goes_from_training_to_a_report(tmp_path: Path) -> None:
    values = recipe("ToyDetection", "toy_detector")
    values["stages"]["train"] |= {"epochs": 12}
    values["stages"]["recover"] |= {"teacher": "unpruned"}
    values["stages"]["recover"]["distill"] = [{"type": "mimic", "student": "backbone.5"}]
    values["require"] = {"metric_drop": 100, "min_metric": 0}
    report = run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)
    first, last = report["variants"]
    for variant in (first, last):  # the file, completed, answers as the network does
        assert variant["metrics"]["map"] == pytest.approx(variant["torch_metrics"]["map"], abs=2)
    assert first["metrics"]["map"] > 50
    assert last["cost"]["params"] < 0.5 * first["cost"]["params"]
    assert last["fusion"]["integer_convs"] >= 2
    assert last["parity"]["sqnr_db"] > 25
    _, prune, recover, int8 = last["stages"]
    assert prune["channels"]
    assert recover["history"]
    assert int8["rounding"]["layers"]
    assert [(gate["name"], gate["bound"]) for gate in report["gates"]] == [
        ("metric_drop", "at most"),
        ("min_metric", "at least"),
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "mAP, %" in page
    assert "accuracy" not in page
    assert page.count('href="data:image/png;base64,') == 2 * 3  # two variants, three images
    assert page.count('<rect class="box"') >= 3
    drawings = report["drawings"]
    assert [drawing["kind"] for drawing in drawings] == ["samples", "table", "lines"]
    again = run_recipe(parse_recipe(values), tmp_path, cache=tmp_path / "cache", progress=False)
    assert again["drawings"] == drawings
    assert all(stage["cached"] for variant in again["variants"] for stage in variant["stages"])


def test_qat_trains_a_detector_whose_loss_is_inside(tmp_path: Path) -> None:
    values = recipe("ToyDetection", "toy_detector", variants={"final": ["train", "int8"]})
    values["stages"]["int8"] = {"type": "qat", "epochs": 1, "batches": 1}
    report = run_recipe(parse_recipe(values), tmp_path, smoke=True, progress=False)
    (variant,) = report["variants"]
    assert variant["fusion"]["integer_convs"] >= 2
    assert variant["stages"][-1]["steps"] == 2


@pytest.mark.parametrize(
    ("task", "model", "criterion"),
    [("ToyDetection", "toy_detector", "taylor"), ("ToyTextClassification", "toy_text", "taylor")],
)
def test_smoke_and_dry_runs_need_no_data(
    tmp_path: Path, task: str, model: str, criterion: str
) -> None:
    values = recipe(task, model)
    values["stages"]["prune"]["criterion"] = criterion
    preview = preview_run(parse_recipe(values), cache=tmp_path / "none")
    assert [row.stage for row in preview.rows if row.variant == "final"][1:] == VARIANTS["final"]
    assert preview.seconds > 0
    report = run_recipe(parse_recipe(values), tmp_path / "out", smoke=True, progress=False)
    assert report["smoke"]
    assert report["data"]["source"] == "synthetic"
    assert [s.get("steps") for s in report["variants"][1]["stages"]] == [2, None, 2, None]
    predict = tmp_path / "out" / "variants" / "final" / "predict.py"
    compile(predict.read_text(encoding="utf-8"), str(predict), "exec")


def test_gates_that_do_not_fit_the_task_are_mistakes() -> None:
    values = recipe("ToyTextClassification", "toy_text")
    for gate, hint in (("accuracy_drop", "metric_drop"), ("min_accuracy", "min_metric")):
        with pytest.raises(RecipeError, match=f"require.{gate}: the task .* has no acc.*{hint}"):
            parse_recipe({**values, "require": {gate: 1}})
    with pytest.raises(RecipeError, match="error rate is within 0 … 1, got 2"):
        parse_recipe({**values, "require": {"min_metric": 2}})


class NoScores(ToyTextClassification):
    def scores(self, answers: Any) -> dict[str, float]:
        return {"errors": 0.5 * len(list(answers))}


class OutOfRange(ToyTextClassification):
    def scores(self, answers: Any) -> dict[str, float]:
        return {name: 100 * value for name, value in super().scores(answers).items()}


class NoScalar(ToyTextClassification):
    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, batch)[0]


class WrongRole(ToyTextClassification):
    def load(self, settings: Any) -> Any:
        splits = super().load(settings)
        return replace(splits, calibration=splits.test)


class Incomplete(ToyTextClassification):
    def complete(self, outputs: Any, inputs: Any) -> Any:
        return {"logits": -outputs["logits"]}


@pytest.mark.parametrize(
    ("task", "member"),
    [
        (NoScores, "scores: the metric that decides, error, is not there"),
        (OutOfRange, "metrics: error is .* outside of 0.0 … 1.0"),
        (NoScalar, "loss: expected .scalar, outputs., got Tensor"),
        (WrongRole, "load: the loader calibration has the role 'test', not 'train'"),
        (Incomplete, "complete: error of the exported module"),
    ],
)
def test_the_member_that_answers_wrongly_is_named(task: type[Task], member: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(TaskError, match=member):
        check_task(task, {"count": 36}, model=toy_text())


def test_a_missing_member_is_named() -> None:
    class Half(Task):
        type: Literal["half"] = "half"

    with pytest.raises(TaskError, match=r"it is missing .define load, loss, scores, synthetic"):
        check_task(Half, model=toy_text())


def test_samples_come_in_an_order_that_can_be_repeated() -> None:
    def loader(**options: Any) -> SampleLoader:
        def change(sample: int, generator: torch.Generator) -> float:
            return sample + float(torch.rand(1, generator=generator))

        return SampleLoader(
            list(range(10)), torch.tensor, batch_size=4, role="train", shuffle=True, change=change,
            **options,
        )  # fmt: skip

    def epoch(loader: SampleLoader, number: int) -> torch.Tensor:
        loader.set_epoch(number)
        return torch.cat(list(loader))

    one, other = loader(seed=1), loader(seed=1)
    assert torch.equal(epoch(one, 3), epoch(other, 3))
    assert not torch.equal(epoch(one, 3), epoch(one, 4))
    assert not torch.equal(epoch(loader(seed=2), 3), epoch(one, 3))
    assert sorted(epoch(one, 0).int().tolist()) == list(range(10))
    assert (len(one), one.samples, one.augmented) == (3, 10, True)
    one.set_epoch(5)
    ids = torch.cat([batch.ids for batch in one.with_ids()])
    assert torch.equal(ids, epoch(one, 5).long())
    one.shard(1, 2)
    assert len(one) == 2
    assert len(epoch(one, 0)) == 5
