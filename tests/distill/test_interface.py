"""What a loss asks for by its signature, patterns that pair layers, and weights that move."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from slimkit.distill import (
    DISTILL_LOSSES,
    KD,
    L1,
    Distiller,
    DistillLoss,
    Mimic,
    Record,
    RecordPath,
    WeightSchedule,
    parse_losses,
)
from slimkit.distill.weighting import confidence_weights
from slimkit.errors import InputError, RecipeError, SlimkitError, UnknownNameError
from slimkit.losses import kd, mimic


class Net(nn.Module):
    """Layers 1 to 3 and a head."""

    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        for number in range(1, layers + 1):
            setattr(self, f"layer{number}", nn.Linear(6 if number == 1 else width, width))
        self.layers = layers
        self.fc = nn.Linear(width, 3)

    def features(self, x: Tensor) -> list[Tensor]:
        found = []
        for number in range(1, self.layers + 1):
            x = getattr(self, f"layer{number}")(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)[-1])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 6)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(3, (7,))


@pytest.fixture(autouse=True)
def _scratch() -> Iterator[None]:
    with DISTILL_LOSSES.scratch():
        yield


def told(distiller: Distiller, student: nn.Module, x: Tensor, **given: Any) -> float:
    return distiller.loss(x, student(x), **given).item()


# --- signatures ----------------------------------------------------------------------------


class Asking(DistillLoss):
    """Compares everything that there is."""

    type: Literal["asking"] = "asking"
    student_late: RecordPath
    teacher_late: RecordPath | None = None
    factor: float = 2.0

    def compute(
        self,
        student: Tensor,
        teacher: Tensor,
        student_late: Tensor,
        teacher_late: Tensor,
        labels: Tensor,
        ids: Tensor,
        inputs: Tensor,
        unused: int = 5,
    ) -> Tensor:
        assert unused == 5
        fixed = labels.sum() + 10 * ids.sum() + 100 * inputs.sum()
        return mimic(student, teacher) + self.factor * mimic(student_late, teacher_late) + fixed


def test_arguments_are_found_by_their_names(x: Tensor, labels: Tensor) -> None:
    student, teacher = Net(), Net()
    loss = Asking(student="layer1", student_late="layer3", teacher_late="layer2")
    ids = torch.arange(7)
    with Distiller(student, teacher, [loss], precision="fp32") as distiller:
        assert distiller.needs("labels")
        assert distiller.needs("ids")
        value = told(distiller, student, x, labels=labels, ids=ids)
    ours, theirs = student.features(x), teacher.features(x)
    expected = mimic(ours[0], theirs[0]) + 2 * mimic(ours[2], theirs[1])
    expected = expected + labels.sum() + 10 * ids.sum() + 100 * x.sum()
    assert value == pytest.approx(expected.item(), rel=1e-4)


def test_a_teachers_further_record_is_the_students_unless_given(x: Tensor, labels: Tensor) -> None:
    student, teacher = Net(), Net()
    loss = Asking(student="layer1", student_late="layer3")
    zeros = torch.zeros(7, dtype=torch.long)
    with Distiller(student, teacher, [loss], precision="fp32") as distiller:
        value = distiller.loss(x, student(x), labels=zeros, ids=zeros)
    ours, theirs = student.features(x), teacher.features(x)
    expected = mimic(ours[0], theirs[0]) + 2 * mimic(ours[2], theirs[2]) + 100 * x.sum()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_training_loops_context_carries_labels_and_ids(x: Tensor, labels: Tensor) -> None:
    student = Net()
    loss = Asking(student="layer1", student_late="layer3")
    with Distiller(student, Net(), [loss]) as distiller:
        context: Any = SimpleNamespace(
            inputs=x, outputs=student(x), targets=labels, ids=torch.arange(7), epoch=0, progress=0.0
        )
        assert distiller(context).isfinite()


@pytest.mark.parametrize("given", ["labels", "ids"])
def test_what_is_missing_is_named(given: str, x: Tensor, labels: Tensor) -> None:
    student = Net()
    loss = Asking(student="layer1", student_late="layer3")
    values: dict[str, Any] = {"labels": labels, "ids": torch.arange(7)}
    del values[given]
    with (
        Distiller(student, Net(), [KD(), loss]) as distiller,
        pytest.raises(InputError, match=rf"losses\.1: the loss 'asking' needs {given}.*{given}="),
    ):
        told(distiller, student, x, **values)


class Misspelt(DistillLoss):
    type: Literal["misspelt"] = "misspelt"

    def compute(self, student: Tensor, teacher: Tensor, lables: Tensor) -> Tensor:
        return student.sum()


class Headless(DistillLoss):
    type: Literal["headless"] = "headless"

    def compute(self, teacher: Tensor) -> Tensor:
        return teacher.sum()


class Deaf(DistillLoss):
    type: Literal["deaf"] = "deaf"

    def compute(self, student: Tensor) -> Tensor:
        return student.square().mean()


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        (Misspelt(), ["losses.1", "asks for 'lables'", "'labels'"]),
        (Headless(), ["losses.1", "does not take the student's record"]),
        (Deaf(student="layer1", teacher="layer2"), ["losses.1.teacher", "takes no 'teacher'"]),
        (Mimic(student="layer[12]", teacher="layer*", connector="none"), [
            "losses.1.student", "layer[12] is 2 layers (layer1, layer2)", "is 3",
        ]),
        (Mimic(student="layr1", connector="none"), ["losses.1.student", "'layr1'", "'layer1'"]),
        (Mimic(student="layer1", teacher="layer9", connector="none"), ["losses.1.teacher"]),
        (KD(teachers=("big",)), ["losses.1.teachers.0", "'big'", "choose from: teacher"]),
    ],
)  # fmt: skip
def test_signatures_and_records_are_checked_when_the_distiller_is_built(
    loss: DistillLoss, parts: list[str]
) -> None:
    student = Net()
    with pytest.raises(SlimkitError) as caught:
        Distiller(student, Net(), [KD(), loss])
    for part in parts:
        assert part in str(caught.value)
    assert not student._forward_hooks


def test_a_loss_may_do_without_the_teacher(x: Tensor) -> None:
    student = Net()
    with Distiller(student, Net(), [Deaf(student="layer1")]) as distiller:
        value = told(distiller, student, x)
    assert value == pytest.approx(student.layer1(x).square().mean().item())


# --- patterns ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_pattern_pairs_layers_in_order(reduce: Any, x: Tensor) -> None:
    student, teacher = Net(), Net()
    loss = Mimic(student="layer*", reduce=reduce, connector="none")
    with Distiller(student, teacher, [loss], precision="fp32") as distiller:
        value = told(distiller, student, x)
    pairs = zip(student.features(x), teacher.features(x), strict=True)
    values = torch.stack([mimic(ours, theirs) for ours, theirs in pairs])
    expected = values.mean() if reduce == "mean" else values.sum()
    assert value == pytest.approx(expected.item(), rel=1e-4)


def test_every_pair_has_a_connector_of_its_own(x: Tensor) -> None:
    losses = [Mimic(student="layer*")]
    with Distiller(Net(), Net(5), losses, example_inputs=x) as distiller:
        assert sorted(distiller.connectors) == ["0_0", "0_1", "0_2"]
        assert len(list(distiller.parameters())) == 6


def test_one_layer_may_teach_several(x: Tensor) -> None:
    student, teacher = Net(), Net()
    loss = Mimic(student="layer*", teacher="layer3", reduce="sum", connector="none")
    with Distiller(student, teacher, [loss], precision="fp32") as distiller:
        value = told(distiller, student, x)
    deepest = teacher.features(x)[-1]
    expected = sum(mimic(ours, deepest).item() for ours in student.features(x))
    assert value == pytest.approx(expected, rel=1e-4)


def test_parameters_and_inputs_can_be_compared(x: Tensor) -> None:
    student, teacher = Net(), Net()
    losses = [
        L1(student=Record(parameter="layer*.weight"), connector="none"),
        L1(student=Record(module="fc", part="input"), connector="none"),
    ]
    with Distiller(student, teacher, losses, precision="fp32") as distiller:
        distiller.loss(x, student(x)).backward()
        names = list(distiller.last)
    assert names == ["l1:parameter layer*.weight", "l1:fc"]
    assert student.layer1.weight.grad is not None
    expected = [
        (ours - theirs).abs().mean().item()
        for ours, theirs in zip(
            (p for n, p in student.named_parameters() if n.endswith("weight") and n[0] == "l"),
            (p for n, p in teacher.named_parameters() if n.endswith("weight") and n[0] == "l"),
            strict=True,
        )
    ]
    assert distiller.last[names[0]].item() == pytest.approx(sum(expected) / 3, rel=1e-4)


# --- the student as its own teacher ----------------------------------------------------------


def test_without_a_teacher_the_students_layers_teach_each_other(x: Tensor) -> None:
    student = Net()
    loss = Mimic(student="layer1", teacher="layer3", connector="none")
    with Distiller(student, None, [loss]) as distiller:
        distiller.loss(x, student(x)).backward()
        value = distiller.last["mimic:layer1"].item()
        assert "teacher_precision" not in distiller.state_dict()
        distiller.load_state_dict(distiller.state_dict())
    first, _, last = student.features(x)
    assert value == pytest.approx(mimic(first, last).item(), rel=1e-4)
    assert student.layer1.weight.grad is not None
    assert student.layer3.weight.grad is None  # who teaches does not learn


def test_a_teacher_and_the_student_itself_may_teach_together(x: Tensor) -> None:
    student, teacher = Net(), Net()
    losses = [
        Mimic(student="layer2", connector="none"),
        Mimic(student="layer2", teacher=Record(module="layer3", of="student"), connector="none"),
    ]
    with Distiller(student, teacher, losses, precision="fp32") as distiller:
        told(distiller, student, x)
        values = [value.item() for value in distiller.last.values()]
    ours, theirs = student.features(x), teacher.features(x)
    expected = [mimic(ours[1], theirs[1]).item(), mimic(ours[1], ours[2]).item()]
    assert values == pytest.approx(expected, rel=1e-4)


def test_a_teacher_of_whom_nothing_is_recorded_does_not_run(x: Tensor) -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    student = Net()
    own = Mimic(student="layer1", teacher=Record(module="layer3", of="student"), connector="none")
    with Distiller(student, Failing(), [own]) as distiller:
        assert told(distiller, student, x) > 0


# --- weights over time -----------------------------------------------------------------------


def test_the_shapes_of_schedules() -> None:
    linear = WeightSchedule(shape="linear", final=0.5)
    assert [linear.factor(0, p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.75, 0.5])
    cosine = WeightSchedule(shape="cosine")
    assert [cosine.factor(0, p) for p in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.853553, 0.5, 0])
    window = WeightSchedule(start_epoch=1, stop_epoch=3)
    assert [window.factor(epoch, 0.5) for epoch in range(5)] == [0, 1, 1, 0, 0]


def test_a_scheduled_weight_scales_the_loss(x: Tensor) -> None:
    student, teacher = Net(), Net()
    losses = parse_losses([{"type": "kd", "weight": 3, "schedule": "linear"}])
    with Distiller(student, teacher, losses, precision="fp32") as distiller:
        value = told(distiller, student, x, epoch=0, progress=0.25)
    assert value == pytest.approx(3 * 0.75 * kd(student(x), teacher(x), 4).item(), rel=1e-4)


def test_a_stopped_loss_costs_nothing(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    student, runs = Net(), []
    loss = KD(schedule=WeightSchedule(stop_epoch=2))
    with Distiller(student, Net(), [loss]) as distiller:
        teacher = distiller._teachers["teacher"]
        call = type(teacher).__call__
        monkeypatch.setattr(
            type(teacher), "__call__", lambda self, inputs: runs.append(1) or call(self, inputs)
        )
        assert told(distiller, student, x, epoch=1, progress=0.5) > 0
        assert told(distiller, student, x, epoch=2, progress=0.9) == 0
        assert distiller.last["kd"].item() == 0
    assert runs == [1]


def test_a_schedule_needs_the_time(x: Tensor) -> None:
    student = Net()
    with (
        Distiller(student, Net(), [KD(schedule=WeightSchedule(shape="cosine"))]) as distiller,
        pytest.raises(InputError, match=r"losses\.0\.schedule.*progress="),
    ):
        told(distiller, student, x)


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"schedule": "cosin"}, ["distill.0.schedule.shape", "'cosine'"]),
        ({"schedule": {"stop_epoch": 1, "start_epoch": 1}}, ["schedule.stop_epoch", "before"]),
        ({"student": {"modul": "fc"}}, ["distill.0.student.modul"]),
        ({"student": {"module": "a", "parameter": "b"}}, ["distill.0.student", "two records"]),
        ({"student": 3}, ["distill.0.student", "expected a layer"]),
        ({"reduce": "max"}, ["distill.0.reduce", "'mean'"]),
    ],
)
def test_mistakes_name_their_path(entry: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_losses([{"type": "kd", **entry}])
    for part in parts:
        assert part in str(caught.value)


# --- several teachers --------------------------------------------------------------------------


def test_several_teachers_count_equally_or_as_told(x: Tensor) -> None:
    student, big, small = Net(), Net(8), Net()
    values = [kd(student(x), teacher(x), 4).item() for teacher in (big, small)]
    with Distiller(student, [big, small], [KD()], precision="fp32") as distiller:
        assert told(distiller, student, x) == pytest.approx(sum(values) / 2, rel=1e-4)
    named = {"big": big, "small": small}
    with Distiller(
        student, named, [KD()], precision="fp32", teacher_weights={"small": 0.2, "big": 0.9}
    ) as distiller:
        expected = 0.9 * values[0] + 0.2 * values[1]
        assert told(distiller, student, x) == pytest.approx(expected, rel=1e-4)


def test_a_loss_may_learn_from_one_of_the_teachers(x: Tensor) -> None:
    student, big, small = Net(), Net(8), Net()
    losses = [KD(), Mimic(student="layer1", teachers=("big",))]
    with Distiller(
        student, {"big": big, "small": small}, losses, precision="fp32", example_inputs=x
    ) as distiller:
        told(distiller, student, x)
        connector = distiller.connectors["student<big"]["1"]
        expected = mimic(connector(student.layer1(x)), big.layer1(x)).item()
        assert distiller.last["mimic:layer1"].item() == pytest.approx(expected, rel=1e-4)
        assert not list(distiller.connectors["student<small"].parameters())


def test_confident_teachers_count_more_on_the_samples_they_know(x: Tensor, labels: Tensor) -> None:
    student, teachers = Net(), [Net(8), Net(), Net(5)]
    with torch.no_grad():
        answers = [teacher(x) for teacher in teachers]
    entropies = torch.stack(
        [nn.functional.cross_entropy(a, labels, reduction="none") for a in answers]
    )
    shares = entropies.exp() / entropies.exp().sum(0)
    weights = (1 - shares) / 2
    assert torch.allclose(confidence_weights(answers, labels), weights, atol=1e-6)
    assert torch.allclose(weights.sum(0), torch.ones(7), atol=1e-6)
    expected = sum(
        kd(student(x), a, 4, sample_weights=w).item() for a, w in zip(answers, weights, strict=True)
    )
    with Distiller(
        student, teachers, [KD()], precision="fp32", teacher_weights="confidence"
    ) as distiller:
        assert distiller.needs("labels")
        assert told(distiller, student, x, labels=labels) == pytest.approx(expected, rel=1e-4)
        with pytest.raises(InputError, match="labels"):
            told(distiller, student, x)
    losses = [L1()]  # a loss that cannot weight single samples takes their mean
    with Distiller(
        student, teachers, losses, precision="fp32", teacher_weights="confidence"
    ) as distiller:
        expected = sum(
            w.mean().item() * (student(x) - a).abs().mean().item()
            for a, w in zip(answers, weights, strict=True)
        )
        assert told(distiller, student, x, labels=labels) == pytest.approx(expected, rel=1e-4)


def test_the_state_of_several_teachers_is_restored(x: Tensor) -> None:
    teachers = {"big": Net(8), "small": Net()}
    losses = [KD(), Mimic(student="layer*")]
    precision: Any = {"big": "bf16", "small": "fp32"}
    student = Net()
    with Distiller(student, teachers, losses, example_inputs=x, precision=precision) as first:
        assert first.precisions == precision
        state = first.state_dict()
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(1)
    with Distiller(student, teachers, losses, example_inputs=x) as second:
        second.load_state_dict(state)
        assert second.precisions == precision
        assert all(torch.equal(state[k], v) for k, v in second.state_dict().items())


def test_one_teacher_may_have_a_name(x: Tensor) -> None:
    student, teacher = Net(), Net(8)
    losses = [Mimic(student="layer1", teachers=("big",))]
    with Distiller(student, {"big": teacher}, losses, example_inputs=x) as distiller:
        assert distiller.loss(x, student(x)).item() > 0
        assert list(distiller.connectors) == ["0"]


def test_nothing_is_left_on_the_student_when_it_cannot_be_built(x: Tensor) -> None:
    student = Net()
    with pytest.raises(SlimkitError, match="no connector joins"):
        Distiller(
            student, Net(), [Mimic(student="layer1", teacher=Record(parameter="fc.bias"))],
            example_inputs=x, deliveries=[f"{__name__}:confidence_weights"],
        )  # fmt: skip
    assert not student._forward_hooks
    assert not student._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"teacher": {}}, InputError, ["teacher", "no teacher"]),
        ({"teacher": {"": Net()}}, InputError, ["''"]),
        ({"teacher": {"a.b": Net(), "a:b": Net()}}, InputError, ["'a.b'"]),
        ({"teacher": {"a": 3}}, InputError, ["teacher.a", "expected a torch.nn.Module"]),
        ({"teacher_weights": [1]}, InputError, ["teacher_weights", "1 weights for 2"]),
        (
            {"teacher_weights": {"0": 1, "3": 1}},
            InputError,
            ["'3'", "choose from: 0, 1"],
        ),
        ({"teacher_weights": [1, -1]}, InputError, ["teacher_weights.1"]),
        ({"teacher_weights": "confident"}, InputError, ["'confidence'"]),
        ({"losses": [Mimic(student="layer7", connector="none")]}, UnknownNameError, ["layer7"]),
    ],
)
def test_mistakes_about_teachers_are_typed(
    arguments: dict[str, Any], error: type[SlimkitError], parts: list[str]
) -> None:
    values: dict[str, Any] = {"teacher": [Net(), Net()], "losses": [KD()], **arguments}
    with pytest.raises(error) as caught:
        Distiller(Net(), **values)
    for part in parts:
        assert part in str(caught.value)
