"""Networks that train together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distill_helpers import Batches, network
from torch import Tensor, nn

from slimkit.distill import KD, Mimic, MutualLearning
from slimkit.errors import CheckpointError, InputError, SlimkitError
from slimkit.losses import kd, mimic
from slimkit.train import TrainSettings, fit


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 6, 6)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(4, (8,))


def test_three_networks_teach_each_other_by_the_formula(images: Tensor, labels: Tensor) -> None:
    networks = [network(width) for width in (4, 6, 8)]
    student, *peers = networks
    with MutualLearning(student, peers, [KD(temperature=1, weight=0.5)]) as mutual:
        loss = mutual.loss(images, student.train()(images), labels=labels)
        loss.backward()
        last = {name: value.item() for name, value in mutual.last.items()}
    answers = [net.train()(images) for net in networks]
    for k, name in enumerate(["kd", "0:kd", "1:kd"]):
        others = [a for index, a in enumerate(answers) if index != k]
        expected = 0.5 * sum(kd(answers[k], other, 1).item() for other in others) / 2
        assert last[name] == pytest.approx(expected, rel=1e-4)
    for k, name in ((1, "0:task"), (2, "1:task")):
        expected = F.cross_entropy(answers[k], labels).item()
        assert last[name] == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(last.values()), rel=1e-5)
    assert all(p.grad is not None for net in networks for p in net.parameters())


def test_who_teaches_does_not_learn_from_it(images: Tensor, labels: Tensor) -> None:
    """The peer's gradient is that of its own loss alone."""
    student, peer = network(4), network(8)
    with MutualLearning(student, peer, [KD(temperature=1)]) as mutual:
        mutual.loss(images, student(images), labels=labels).backward()
    grad = peer[-1].weight.grad
    assert grad is not None
    alone = network(8).train()
    answer = alone(images)
    own = F.cross_entropy(answer, labels) + kd(answer, student(images), 1)
    (expected,) = torch.autograd.grad(own, [alone[-1].weight])
    assert torch.allclose(grad, expected, atol=1e-6)


def test_layers_are_named_by_owner_whoever_learns(images: Tensor, labels: Tensor) -> None:
    student = nn.Sequential(nn.Identity(), *network(4))
    peer = network(4)
    losses = [Mimic(student="3", teacher="2", connector="none")]
    with MutualLearning(student, peer, losses) as mutual:
        mutual.loss(images, student(images), labels=labels)
        values = [mutual.last[name].item() for name in ("mimic", "teacher:mimic")]
    distance = mimic(student[:4](images), peer.train()[:3](images)).item()
    assert values == pytest.approx([distance, distance], rel=1e-4)


class KilledError(Exception):
    """Stands for a killed process."""


def trained(checkpoint: Path, *, stop_after: int | None = None) -> dict[str, Tensor]:
    student, peer = network(4), network(8)
    losses = [KD(temperature=1), Mimic(student="2")]
    steps = 0
    with MutualLearning(student, peer, losses, example_inputs=torch.zeros(1, 3, 6, 6)) as mutual:

        class Term:
            parameters = mutual.parameters
            state_dict = mutual.state_dict
            load_state_dict = mutual.load_state_dict

            def __call__(self, context: object) -> Tensor:
                nonlocal steps
                steps += 1
                if steps == stop_after:
                    raise KilledError
                return mutual(context)  # type: ignore[arg-type]

        fit(
            student,
            Batches(),
            loss_fn=F.cross_entropy,
            settings=TrainSettings(epochs=3, lr=0.05, precision="fp32"),
            losses=[Term()],
            checkpoint=checkpoint,
            progress=False,
        )
        return {**student.state_dict(), **mutual.state_dict()}


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    assert not torch.equal(whole["peer:teacher.0.weight"], network(8)[0].weight)
    with pytest.raises(KilledError):
        trained(tmp_path / "killed", stop_after=7)
    resumed = trained(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_both_networks_come_to_agree(images: Tensor, labels: Tensor) -> None:
    student, peer = network(4), network(8)
    with MutualLearning(student, peer, [KD(temperature=1, weight=3)]) as mutual:
        optimizer = torch.optim.Adam([*student.parameters(), *mutual.parameters()], lr=0.01)
        gaps = []
        for _ in range(30):
            optimizer.zero_grad()
            mutual.loss(images, student(images), labels=labels).backward()
            optimizer.step()
            gaps.append(mutual.last["kd"].item())
    assert gaps[-1] < 0.5 * gaps[0]
    assert not peer.training
    assert not student._forward_hooks


def test_mistakes_are_typed(images: Tensor, labels: Tensor) -> None:
    student = network(4)
    with pytest.raises(InputError, match="peers"):
        MutualLearning(student, None, [KD()])
    with pytest.raises(InputError, match="its own peer"):
        MutualLearning(student, [student], [KD()])
    with pytest.raises(InputError, match=r"losses\.0\.teachers"):
        MutualLearning(student, network(8), [KD(teachers=("teacher",))])
    with pytest.raises(InputError, match="example_inputs"):
        MutualLearning(student, network(8), [Mimic(student="2")])
    with pytest.raises(SlimkitError, match="no layer '7'"):
        MutualLearning(student, network(8), [Mimic(student="2", teacher="7", connector="none")])
    assert not student._forward_hooks
    with MutualLearning(student, network(8), [KD()]) as mutual:
        with pytest.raises(InputError, match="has not run"):
            mutual.loss(images, labels=labels)
        with pytest.raises(CheckpointError):
            mutual.load_state_dict({})
