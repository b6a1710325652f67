"""Gradual magnitude pruning: the schedule's figures, zeros that stay, resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import slimkit as sk
from slimkit.errors import CheckpointError, InputError, PlanError
from slimkit.sparsify.schedule import GradualSchedule
from slimkit.train import TrainSettings, WeightAverage, fit


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def data(count: int = 64) -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 8)


def test_the_schedule_has_the_figures_of_paddleslim() -> None:
    schedule = GradualSchedule(stable=0, pruning=100, tuning=100, updates=10, initial=0.15)
    values = [schedule.sparsity(step, 0.55) for step in range(0, 110, 10)]
    assert values[0] == pytest.approx(0.15)
    assert values[9] == pytest.approx(0.5496)
    assert values[10] == 0.55
    assert schedule.sparsity(9, 0.55) == values[0]
    assert values == sorted(values)
    assert GradualSchedule(5, 10, 5, updates=5).sparsity(4, 0.5) == 0.0


def test_phases_as_fractions_cover_the_training() -> None:
    schedule = GradualSchedule.over(1000, stable=0.1, pruning=0.45)
    assert (schedule.stable, schedule.pruning, schedule.tuning) == (100, 450, 450)
    assert GradualSchedule.over(3).steps == 3
    with pytest.raises(InputError, match="longer than the training"):
        GradualSchedule.over(100, stable=0.5, pruning=0.6)
    with pytest.raises(InputError, match="do not fit"):
        GradualSchedule(0, 5, 5, updates=6)
    with pytest.raises(InputError, match="not above"):
        sk.sparsify.GradualPruner(network(), 0.1, steps=10)


def trained(
    steps: int, pruner_options: dict[str, object] | None = None
) -> tuple[nn.Module, object]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = sk.sparsify.GradualPruner(model, 0.75, steps=steps, **(pruner_options or {}))  # type: ignore[arg-type]
    batches = list(data())
    for step in range(steps):
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name)[~mask].any()
    return model, pruner


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_grow_to_the_target_and_stay_in_a_plain_loop(scope: str) -> None:
    model, pruner = trained(60, {"scope": scope})
    plan = pruner.plan()  # type: ignore[attr-defined]
    assert plan.sparsity == pytest.approx(0.75, abs=0.02)
    sk.apply(model, plan)
    held = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert held == sum(int((~mask).sum()) for mask in plan.masks.values())


def test_two_of_four_is_reached_at_the_end() -> None:
    model = network()
    options = {"pattern": sk.sparsify.NofM(2, 4)}
    pruner = sk.sparsify.GradualPruner(model, 0.5, steps=20, **options)  # type: ignore[arg-type]
    for _ in range(20):
        pruner.step()
    groups = (model[2].weight != 0).view(-1, 4)
    assert (groups.sum(1) <= 2).all()
    with pytest.raises(InputError, match="2:4 has a sparsity"):
        sk.sparsify.GradualPruner(network(), 0.75, steps=20, **options)  # type: ignore[arg-type]


def test_a_resumed_pruner_is_the_undisturbed_one() -> None:
    whole, _ = trained(40)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = sk.sparsify.GradualPruner(model, 0.75, steps=40)
    batches = list(data())
    for step in range(40):
        if step == 17:
            state = pruner.state_dict()
            pruner = sk.sparsify.GradualPruner(model, 0.75, steps=40)
            pruner.load_state_dict(state)
        x, y = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.step()
    for mine, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
    state.pop("mask.0.weight")
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        pruner.load_state_dict(state)


def test_zeros_are_exact_in_the_average_of_weights_and_after_a_killed_training(tmp_path) -> None:  # type: ignore[no-untyped-def]
    class Stop(sk.train.Callback):
        def on_epoch_end(self, context: object) -> None:
            if context.epoch == 1:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

    def train(checkpoint: object, extra: list[object]) -> nn.Module:
        model = network()
        pruner = sk.sparsify.GradualPruner(model, 0.75, steps=8 * 6)
        fit(
            model,
            data(),
            loss_fn=nn.functional.cross_entropy,
            settings=TrainSettings(epochs=6, lr=0.05, ema=0.9),
            callbacks=[pruner, *extra],  # type: ignore[list-item]
            checkpoint=checkpoint,  # type: ignore[arg-type]
            progress=False,
        )
        sk.apply(model, pruner.plan())
        assert pruner.plan().sparsity == pytest.approx(0.75, abs=0.02)
        for name, mask in pruner.masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
        return model

    whole = train(None, [])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run.safetensors", [Stop()])
    resumed = train(tmp_path / "run.safetensors", [])
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_held_zeros_survive_quantization_aware_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(),
        nn.Linear(288, 4),
    ).eval()  # fmt: skip
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.7))
    quantized = sk.quantize.qat(model, x, calibration=[x])
    hold = sk.sparsify.HoldZeros(quantized)
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1)
    quantized.train()
    for _ in range(5):
        optimizer.zero_grad()
        quantized(x).square().mean().backward()
        optimizer.step()
        hold.step()
    zeros = {name.removeprefix("model."): int((~mask).sum()) for name, mask in hold.masks.items()}
    assert zeros == {
        name: int((parameter == 0).sum())
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }
    for name, mask in hold.masks.items():
        assert not quantized.get_parameter(name)[~mask].any()


def test_holding_needs_zeros_and_the_same_model() -> None:
    with pytest.raises(PlanError, match="no weight of Sequential is zero"):
        sk.sparsify.HoldZeros(network())
    model = network()
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.5))
    hold = sk.sparsify.HoldZeros(model)
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(PlanError, match="another parameter"):
        hold.step()


def test_an_average_of_ones_own_keeps_the_zeros() -> None:
    model = network()
    average = WeightAverage(model, 0.9)
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.5))
    average.update()
    average.copy_to_model()
    assert int((model[2].weight == 0).sum()) == 512
