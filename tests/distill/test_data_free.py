"""A generator that invents what a student learns from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit import losses
from slimkit.distill import KD, L1, Distiller
from slimkit.distill.data_free import (
    DAFL,
    DFAD,
    GENERATION,
    ZSKT,
    GeneratedBatches,
    ImageGenerator,
)
from slimkit.errors import CheckpointError, InputError, SlimkitError
from slimkit.train import TrainSettings, fit

SHAPE = (3, 10, 8)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).mean((2, 3)))


def networks() -> tuple[Net, Net]:
    torch.manual_seed(1)
    student, teacher = Net(4), Net(8)
    with torch.no_grad():
        teacher.fc.weight *= 10
    return student, teacher


def batches(settings: Any, student: nn.Module, teacher: nn.Module, steps: int = 20) -> Any:
    return GeneratedBatches(student, teacher, settings, shape=SHAPE, batch_size=16, steps=steps)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 7), (3, 32, 32)])
def test_a_generator_makes_normalised_images_of_any_size(shape: tuple[int, int, int]) -> None:
    images = ImageGenerator(5, shape, width=4)(torch.randn(16, 5))
    assert images.shape == (16, *shape)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4)


@pytest.mark.parametrize("name", GENERATION.names())
def test_the_generator_lowers_its_objective_and_nothing_else_moves(name: str) -> None:
    student, teacher = networks()
    before = copy.deepcopy([student.state_dict(), teacher.state_dict()])
    settings = GENERATION.get(name).model_validate({"width": 8, "latent": 8, "student_steps": 1})
    source = batches(settings, student.train(), teacher, steps=40)
    seen = list(source)
    assert len(seen) == 40
    assert sum(source.objectives[-5:]) < sum(source.objectives[:5])
    for network, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())
    assert student.training


def test_the_objectives_are_the_sums_of_their_losses() -> None:
    student, teacher, features = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 5)
    expected = (
        0.5 * losses.dafl_one_hot(teacher)
        + 2 * losses.dafl_entropy(teacher)
        + 3 * losses.dafl_activation(features)
    )
    dafl = DAFL(one_hot=0.5, entropy=2, activation=3)
    assert dafl.objective(None, teacher, features).item() == pytest.approx(expected.item())
    assert ZSKT(temperature=2).objective(student, teacher, features).item() == pytest.approx(
        losses.zskt_gap(student, teacher, 2).item()
    )
    assert DFAD().objective(student, teacher, features).item() == pytest.approx(
        losses.dfad_gap(student, teacher).item()
    )


def test_labels_are_the_teachers() -> None:
    student, teacher = networks()
    for images, labels in batches(DAFL(width=4), student, teacher, steps=2):
        assert torch.equal(labels, teacher.eval()(images).argmax(1))
        assert not images.requires_grad


def test_the_features_of_dafl_are_what_goes_into_the_last_linear_layer() -> None:
    student, teacher = networks()
    source = batches(DAFL(width=4), student, teacher)
    assert (source._tap.name, source._tap.part) == ("fc", "input")
    named = batches(DAFL(width=4, features="body.0"), student, teacher)
    assert (named._tap.name, named._tap.part) == ("body.0", "output")


class KilledError(Exception):
    """Stands for a killed process."""


def trained(checkpoint: Path, *, stop_after: int | None = None) -> dict[str, Tensor]:
    student, teacher = networks()
    source = batches(DFAD(width=4, latent=6, student_steps=2), student, teacher, steps=4)
    steps = 0

    def killing(_context: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            raise KilledError
        return torch.zeros(())

    with Distiller(student, teacher, [KD(), L1()], precision="fp32") as distiller:
        fit(
            student,
            source,
            loss_fn=F.cross_entropy,
            settings=TrainSettings(epochs=3, lr=0.05, precision="fp32", loss_weight=0),
            losses=[distiller, killing],
            callbacks=[source],
            checkpoint=checkpoint,
            progress=False,
        )
    return {**student.state_dict(), **source.state_dict()}


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", stop_after=7)
    resumed = trained(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert any(key.startswith("optimizer.") for key in whole)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_student_learns_its_teacher_without_a_single_image() -> None:
    student, teacher = networks()
    real = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(9))

    def gap() -> float:
        with torch.no_grad():
            return losses.kd(student.eval()(real), teacher.eval()(real), 1).item()

    before = gap()
    source = batches(DAFL(width=8, latent=16), student, teacher, steps=60)
    with Distiller(student, teacher, [KD(temperature=2)], precision="fp32") as distiller:
        fit(
            student,
            source,
            loss_fn=F.cross_entropy,
            settings=TrainSettings(epochs=1, lr=0.05, precision="fp32", loss_weight=0),
            losses=[distiller],
            progress=False,
        )
    assert gap() < 0.7 * before


def test_mistakes_are_typed() -> None:
    student, teacher = networks()
    with pytest.raises(SlimkitError, match="no layer 'fv'"):
        batches(DAFL(features="fv"), student, teacher)
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(InputError, match="no linear layer"):
        batches(DAFL(), student, headless)
    assert len(list(batches(DAFL(activation=0, width=4), student, headless, steps=1))) == 1
    with pytest.raises(CheckpointError, match="generator"):
        batches(DAFL(), student, teacher).load_state_dict({})
