"""Every registered loss in a short run: it falls, and it reaches the student and its modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimkit.distill import DISTILL_LOSSES, Distiller, parse_losses
from slimkit.errors import SlimkitError
from slimkit.losses import kd

SAMPLES = 24


class Net(nn.Module):
    """Two stages and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.layer2 = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(images)).mean((2, 3)))


EMBEDDING = {"module": "fc", "part": "input"}
BATCH_NORM = {"student": "layer2.1"}
SETTINGS: dict[str, dict[str, Any]] = {
    "activation_boundary": BATCH_NORM,
    "attention_transfer": {"student": "layer*"},
    "byot": {"student": "layer1", "student_deep": EMBEDDING},
    "crd": {"student": EMBEDDING, "samples": SAMPLES, "negatives": 16, "size": 16},
    "cwd": {"student": "layer2"},
    "factor_transfer": {"student": "layer2"},
    "fbkd": {"student": "layer2", "mask_weight": 1, "attention_weight": 1, "relation_weight": 1},
    "fsp": {"student": "layer1", "student_late": "layer2"},
    "function": {
        "student": "layer2",
        "function": "torch.nn.functional:smooth_l1_loss",
        "options": {"beta": 0.5},
    },
    "localization_kd": {"student": "fc", "teacher_scores": "fc", "bins": 1},
    "mgd": {"student": "layer2", "mask": 0.3},
    "mimic": {"student": "layer2"},
    "ofd": BATCH_NORM,
    "pkd": {"student": "layer2"},
    "quality_kd": {"student": "fc"},
    "rkd_angle": {"student": EMBEDDING},
    "rkd_distance": {"student": EMBEDDING},
}
ENDS_AT_AN_ENTROPY = {"soft_cross_entropy", "wsld"}


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.randn(SAMPLES, 3, 8, 8, generator=generator),
        "labels": torch.randint(4, (SAMPLES,), generator=generator),
        "ids": torch.randperm(SAMPLES, generator=generator),
    }


@pytest.fixture
def teacher() -> Net:
    """Of twice the width, with statistics and scales that a training would leave."""
    torch.manual_seed(5)
    net = Net(8)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        net.fc.weight *= 8
    return net


@pytest.mark.parametrize("name", DISTILL_LOSSES.names())
def test_a_short_run_lowers_the_loss(name: str, teacher: Net, batch: dict[str, Tensor]) -> None:
    student = Net(4)
    losses = [{"type": name, **SETTINGS.get(name, {})}]
    before = copy.deepcopy(teacher.state_dict())
    images = batch["images"]
    answers = copy.deepcopy(teacher).eval()(images)
    with Distiller(
        student, teacher, losses, example_inputs=images[:2], precision="fp32"
    ) as distiller:
        optimizer = torch.optim.Adam([*student.parameters(), *distiller.parameters()], lr=0.01)
        values = []
        for _ in range(30):
            optimizer.zero_grad()
            outputs = student(images)
            loss = distiller.loss(
                images, outputs, labels=batch["labels"], ids=batch["ids"], epoch=0, progress=0.0
            )
            loss.backward()
            if not values:
                grads = [p.grad for p in student.layer1.parameters()]
                assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
                assert any(bool(grad.any()) for grad in grads if grad is not None)
                assert all(p.grad is not None for p in distiller.parameters())
            optimizer.step()
            gap = kd(outputs, answers, 1) if name in ENDS_AT_AN_ENTROPY else loss
            values.append(gap.item())
    # random masks and negatives make single values jump
    assert sum(values[-5:]) < 0.9 * sum(values[:5]), values
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", DISTILL_LOSSES.names())
def test_a_losss_modules_start_equal_and_leave_the_random_state_alone(
    name: str, teacher: Net, batch: dict[str, Tensor]
) -> None:
    losses = [{"type": name, **SETTINGS.get(name, {})}]
    states = []
    student = Net(4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with Distiller(student, teacher, losses, example_inputs=batch["images"][:2]) as distiller:
            states.append(distiller.state_dict())
        assert torch.equal(before, torch.get_rng_state())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", DISTILL_LOSSES.names())
def test_a_recipe_reads_back_what_it_wrote(name: str) -> None:
    (loss,) = parse_losses([{"type": name, **SETTINGS.get(name, {})}])
    assert parse_losses([loss.model_dump(mode="json")]) == [loss]
    assert (type(loss).__doc__ or "").strip().splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", ["dkd", "wsld", "byot", "crd"])
def test_what_a_loss_needs_and_does_not_get_is_named(
    name: str, teacher: Net, batch: dict[str, Tensor]
) -> None:
    student = Net(4)
    images = batch["images"]
    losses = [{"type": "kd"}, {"type": name, **SETTINGS.get(name, {})}]
    needed = "ids" if name == "crd" else "labels"
    with Distiller(student, teacher, losses, example_inputs=images[:2]) as distiller:
        assert distiller.needs(needed)
        with pytest.raises(SlimkitError, match=rf"losses\.1: the loss '{name}' needs {needed}"):
            distiller.loss(images, student(images))


def test_the_memory_of_crd_is_part_of_the_checkpoint_and_knows_its_size(
    teacher: Net, batch: dict[str, Tensor]
) -> None:
    student, images = Net(4), batch["images"]
    losses = [{"type": "crd", **SETTINGS["crd"]}]
    with Distiller(student, teacher, losses, example_inputs=images[:2]) as distiller:
        before = distiller.state_dict()["connectors.0_memory.student"].clone()
        distiller.loss(images[:4], student(images[:4]), ids=batch["ids"][:4])
        after = distiller.state_dict()["connectors.0_memory.student"]
        changed = (after != before).any(dim=1)
        assert sorted(changed.nonzero().flatten().tolist()) == sorted(batch["ids"][:4].tolist())
        with pytest.raises(SlimkitError, match="room for 24 samples, got the id 24"):
            distiller.loss(images[:1], student(images[:1]), ids=torch.tensor([SAMPLES]))


def test_the_margin_is_the_mean_of_the_negative_values() -> None:
    from slimkit.distill.losses.modules import MarginReLU

    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.3, -1.0, 20.0]))
    margins = MarginReLU.of(norm, where="bn").margins
    normal = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)).double()
    for channel in range(2):
        scale, shift = norm.weight[channel].abs().item(), norm.bias[channel].item()
        values = shift + scale * normal
        expected = values[values < 0].mean().item()
        assert margins[channel].item() == pytest.approx(expected, abs=3e-3)
    assert -0.5 < margins[2].item() <= 0  # hardly ever negative
    maps = torch.full((1, 3, 2, 2), -9.0)
    assert torch.equal(MarginReLU(margins)(maps)[0, :, 0, 0], margins)


def test_the_margin_needs_a_batch_norm(teacher: Net, batch: dict[str, Tensor]) -> None:
    with pytest.raises(SlimkitError, match=r"layer2: the margin of ofd .* a Sequential"):
        Distiller(
            Net(4), teacher, [{"type": "ofd", "student": "layer2"}],
            example_inputs=batch["images"],
        )  # fmt: skip


def test_a_masked_generator_hides_positions_in_training_only() -> None:
    from slimkit.distill.losses.modules import MaskedGenerator

    module = MaskedGenerator(None, 2, 0.5)
    module.generation = nn.Sequential(nn.Identity())
    ones = torch.ones(4, 2, 16, 16)
    hidden = module(ones)
    assert torch.equal(hidden[:, 0], hidden[:, 1])  # whole positions
    assert 0.4 < hidden.mean().item() < 0.6
    assert torch.equal(module.eval()(ones), ones)
