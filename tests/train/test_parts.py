"""Schedules, optimizer groups, weight average and batch-norm statistics against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from slimkit.errors import InputError
from slimkit.train import TrainSettings, WeightAverage, reestimate_batch_norm
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
