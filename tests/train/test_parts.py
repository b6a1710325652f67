"""Schedules, optimizer groups, weight average and batch-norm statistics against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from slimkit.errors import InputError
from slimkit.train import TrainSettings, WeightAverage, fit, reestimate_batch_norm
from slimkit.train.optimisation import build_optimizer, learning_rate


def rates(total: int = 100, per_epoch: int = 10, **kwargs: object) -> list[float]:
    settings = TrainSettings(lr=1.0, **kwargs)  # type: ignore[arg-type]
    return [learning_rate(settings, step, total, per_epoch) for step in range(total)]


def test_cosine_follows_the_formula() -> None:
    for step, rate in enumerate(rates(schedule="cosine")):
        assert rate == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 100)))


def test_warmup_rises_linearly_to_the_peak() -> None:
    values = rates(schedule="cosine", warmup_epochs=2)
    assert values[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert max(values) == values[20] == pytest.approx(1.0)
    assert values[-1] < 0.001


def test_one_cycle_peaks_once_and_ends_near_zero() -> None:
    values = rates(schedule="one_cycle")
    assert values[0] == pytest.approx(1 / 25)
    assert values[30] == pytest.approx(1.0)
    assert values[:31] == sorted(values[:31])
    assert values[30:] == sorted(values[30:], reverse=True)
    assert values[-1] < 0.002


def test_linear_and_constant() -> None:
    assert rates(schedule="linear") == pytest.approx([1 - step / 100 for step in range(100)])
    assert set(rates(schedule="constant")) == {1.0}


def test_norms_and_biases_can_be_spared_from_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    spared = build_optimizer(model, TrainSettings(decay_norms=False, weight_decay=0.1))
    decays = {
        p.dim(): group["weight_decay"] for group in spared.param_groups for p in group["params"]
    }
    assert decays == {4: 0.1, 1: 0.0}
    assert len(build_optimizer(model, TrainSettings()).param_groups) == 1


def test_tied_parameters_are_stepped_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = build_optimizer(model, TrainSettings())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_weight_average_follows_its_formula() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    average = WeightAverage(model, decay=0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)):
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert model[0].weight.item() == pytest.approx(expected, rel=1e-5)
        assert model[1].running_mean.item() > 500
    assert model[0].weight.item() == 1024.0


def test_other_buffers_are_not_averaged() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("largest", torch.tensor(float("inf")))
    average = WeightAverage(model, decay=0.9)
    model.largest.fill_(3.0)
    average.update()
    average.copy_to_model()
    assert model.largest.item() == 3.0


def test_reestimated_statistics_are_the_true_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    batches = [2 + 3 * torch.randn(50, 3) for _ in range(8)]
    assert reestimate_batch_norm(model, ((batch, None) for batch in batches)) == 8
    everything = torch.cat(batches)
    torch.testing.assert_close(model[0].running_mean, everything.mean(0))
    variances = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(model[0].running_var, variances)
    assert model[2].running_var == pytest.approx(torch.ones(3), rel=0.05)  # dropout was off
    assert model[1].training
    assert model[0].momentum == 0.1


def test_reestimation_without_batches_keeps_the_statistics() -> None:
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(5.0)
    with pytest.raises(InputError, match="no batches"):
        reestimate_batch_norm(model, [])
    assert model.running_mean.tolist() == [5.0, 5.0]
    assert model.num_batches_tracked.item() == 0


def test_reestimation_of_a_model_without_norms_does_nothing() -> None:
    assert reestimate_batch_norm(nn.Linear(2, 2), []) == 0


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": -1}, {"ema": 1.5}, {"schedule": "cosin"}, {"lrate": 0.1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainSettings(**wrong)  # type: ignore[arg-type]


def late_gradients(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(3)
    for step in range(6):
        for index, parameter in enumerate(parameters):
            absent = (index == 1 and step < 3) or (index == 2 and step % 2)
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if absent else drawn
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_gradient_that_comes_late_is_stepped_as_by_torchs_own_sgd(
    nesterov: bool, decay: float
) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = TrainSettings(lr=0.1, weight_decay=decay, nesterov=nesterov)
    late_gradients(build_optimizer(models[0], settings), list(models[0].parameters()))
    own = torch.optim.SGD(
        models[1].parameters(), lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=decay
    )
    late_gradients(own, list(models[1].parameters()))
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_momentum_from_the_start_changes_no_bit_of_fused_sgd() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(9, 5), nn.Linear(5, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mine = build_optimizer(models[0], TrainSettings(lr=0.1, weight_decay=0.1))
    assert all("momentum_buffer" in mine.state[p] for p in models[0].parameters())
    theirs = torch.optim.SGD(
        models[1].parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        mine.step()
        theirs.step()
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_path_that_is_taken_later_trains(optimizer: str) -> None:
    class OnePath(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.steps = nn.Linear(4, 2), nn.Linear(4, 2), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += self.training
            return (self.a if self.steps <= 2 else self.b)(x)

    network = OnePath()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    data = [(torch.randn(8, 4), torch.arange(8) % 2)] * 4
    settings = TrainSettings(epochs=1, lr=0.01, optimizer=optimizer, precision="fp32")  # type: ignore[arg-type]
    fit(network, data, loss_fn=nn.functional.cross_entropy, settings=settings, progress=False)
    assert not any(torch.equal(before[name], t) for name, t in network.state_dict().items())


def test_statistics_are_measured_on_whatever_a_loader_yields() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.norm(a + b)

    class Images(Words):
        def forward(self, images: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            return self.norm(torch.stack([image.mean((1, 2)) for image in images]))

    torch.manual_seed(0)
    a, b = torch.randn(6, 3), torch.randn(6, 3)
    for item in ({"a": a, "b": b}, ({"b": b, "a": a}, None), ((a, b), torch.zeros(6))):
        model = Words()
        assert reestimate_batch_norm(model, [item]) == 1
        torch.testing.assert_close(model.norm.running_mean, (a + b).mean(0))
    images = [torch.randn(3, 4, 5), torch.randn(3, 6, 2)]
    listed = Images()
    reestimate_batch_norm(listed, [(images, [{}, {}])])
    means = torch.stack([image.mean((1, 2)) for image in images])
    torch.testing.assert_close(listed.norm.running_mean, means.mean(0))
    with pytest.raises(InputError, match="batches"):
        reestimate_batch_norm(Words(), ["words"])
