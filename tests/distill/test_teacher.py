"""The frozen copy of the teacher: folding, precision, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_helpers import network
from torch import Tensor, nn

from slimkit.distill.distilling import Distiller
from slimkit.distill.losses.catalogue import KD, Mimic
from slimkit.distill.teacher import FrozenTeacher
from slimkit.errors import ModelError
from slimkit.inputs import as_inputs


def images(device: Any = "cpu") -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)


def inner(teacher: FrozenTeacher) -> nn.Module:
    assert teacher._runner is not None
    return teacher._runner.model


def test_batch_norms_are_folded() -> None:
    teacher = FrozenTeacher(network(8), ["", "1"], precision="fp32")
    records = teacher(as_inputs(images()))
    assert isinstance(inner(teacher).get_submodule("1"), nn.Identity)
    assert set(records) == {"", "1"}


def test_a_recorded_convolution_keeps_its_batch_norm() -> None:
    teacher = FrozenTeacher(network(8), ["0"], precision="fp32")
    teacher(as_inputs(images()))
    assert isinstance(inner(teacher).get_submodule("1"), nn.BatchNorm2d)


def test_bf16_weights_are_bf16_and_records_float32() -> None:
    teacher = FrozenTeacher(network(8), [""], precision="bf16")
    records = teacher(as_inputs(images()))
    assert all(p.dtype == torch.bfloat16 for p in inner(teacher).parameters())
    assert records[""].dtype == torch.float32
    assert not records[""].requires_grad


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_chosen_where_the_device_multiplies_it(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkit.distill.teacher.multiplies_bf16", lambda device: native)
    model = network(8)
    model[-1].bias.data[2] += 10  # a clear winner, whatever the precision
    teacher = FrozenTeacher(model, [""])
    teacher(as_inputs(images()))
    assert teacher.precision == expected


def test_precision_that_disagrees_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimkit.distill.teacher.multiplies_bf16", lambda device: True)

    class Fragile(nn.Module):
        """Its classes differ by less than bf16 can tell."""

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            return 1000 + values + 0 * self.body(values)

    teacher = FrozenTeacher(Fragile(), [""])
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 4, generator=generator)
    records = teacher(as_inputs(values))
    assert teacher.precision != "bf16"
    assert torch.equal(records[""].argmax(1), (1000 + values).argmax(1))


def test_an_operator_without_bf16_leaves_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimkit.distill.teacher.multiplies_bf16", lambda device: True)

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4) * 2)

        def forward(self, values: Tensor) -> Tensor:
            return torch.linalg.solve(self.weight, values.t()).t()

    teacher = FrozenTeacher(Inverse(), [""])
    teacher(as_inputs(torch.randn(8, 4)))
    assert teacher.precision in {"fp32", "autocast"}


def test_a_teacher_that_fails_says_so() -> None:
    teacher = FrozenTeacher(network(8), [""])
    with pytest.raises(ModelError, match="teacher"):
        teacher(as_inputs(torch.randn(2, 5, 8, 8)))


def test_a_layer_that_does_not_run_is_named() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            return self.used(values)

    teacher = FrozenTeacher(Skips(), ["unused"], precision="fp32")
    with pytest.raises(ModelError, match="'unused'"):
        teacher(as_inputs(torch.randn(2, 4)))


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "autocast"])
def test_student_and_teacher_meet_on_the_students_device(
    device: torch.device, precision: Any
) -> None:
    student, teacher = network(4), network(16)
    losses = [KD(), Mimic(student="2")]
    batch = images(device)
    with Distiller(
        student, teacher, losses, example_inputs=images(), precision=precision
    ) as distiller:
        student.to(device)  # after construction, as training loops do
        loss = distiller.loss(batch, student(batch))
        loss.backward()
    assert loss.device.type == device.type
    assert all(p.grad is not None for p in distiller.parameters())
