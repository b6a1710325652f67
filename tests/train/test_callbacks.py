"""Callbacks hear of every part of a step in order; what they do to weights is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.tasks.data import ArrayLoader
from slimkit.train import Callback, EpochContext, StepContext, TrainSettings, WeightAverage, fit

SETTINGS = TrainSettings(epochs=2, lr=0.05, ema=0.9, precision="fp32")


class Masks(Callback):
    """Keeps a share of a weight at zero, from a step on."""

    def __init__(self, weight: nn.Parameter, hook: str, start: int = 0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight, self.start = weight, start
        self.mask = (torch.rand(weight.shape, generator=generator) > 0.75).float()
        setattr(self, hook, self.apply)

    def apply(self, context: StepContext) -> None:
        if context.step >= self.start:
            with torch.no_grad():
                self.weight.mul_(self.mask)

    @property
    def zeros(self) -> Tensor:
        return self.mask == 0


@pytest.mark.parametrize("hook", ["on_update", "on_step_end"])
@pytest.mark.parametrize("start", [0, 7, 11])
def test_masks_survive_the_weight_average(
    network: nn.Sequential, data: ArrayLoader, hook: str, start: int, tmp_path: Path
) -> None:
    masks = Masks(network[0].weight, hook, start)
    evaluated: list[bool] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        evaluated.append(torch.equal(network[0].weight == 0, masks.zeros))
        return {}

    path = tmp_path / "run.safetensors"
    fit(
        network, data, loss_fn=F.cross_entropy, callbacks=[masks], settings=SETTINGS,
        evaluate=evaluate, checkpoint=path, progress=False,
    )  # fmt: skip
    assert torch.equal(network[0].weight == 0, masks.zeros)
    assert torch.equal(load_file(path)["average/0.weight"] == 0, masks.zeros)
    assert evaluated == [start < 6, True]


def test_the_average_takes_in_what_callbacks_made_of_the_weights(
    network: nn.Sequential, data: ArrayLoader
) -> None:
    class Fixed(Callback):
        """The first weight is 1 after every update, whatever the optimizer did."""

        def on_update(self, context: StepContext) -> None:
            with torch.no_grad():
                context.model[0].weight.fill_(1.0)

    with torch.no_grad():
        network[0].weight.fill_(1.0)
    fit(
        network, data, loss_fn=F.cross_entropy, callbacks=[Fixed()], settings=SETTINGS,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(network[0].weight, torch.ones_like(network[0].weight))


def test_zeros_of_statistics_and_other_weights_are_averaged_by_the_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        model[1].running_mean.fill_(5.0)
    average = WeightAverage(model, decay=0.9)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 4.0]]))
        model[1].running_mean.fill_(0.0)
    average.update()  # d = 1 / 10
    average.keep_zeros()
    assert average.average["0.weight"].tolist() == [[0.0, pytest.approx(0.1 * 2 + 0.9 * 4)]]
    assert average.average["1.running_mean"].item() == pytest.approx(0.5)


def test_the_parts_of_a_step_are_told_in_order(network: nn.Sequential, data: ArrayLoader) -> None:
    told: list[tuple[str, str, int]] = []
    weights: list[Tensor] = []

    class Listener(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step_begin(self, context: StepContext) -> None:
            assert context.outputs is None
            assert context.optimizer is not None
            weights.append(network[0].weight.detach().clone())
            told.append((self.name, "begin", context.step))

        def on_update(self, context: StepContext) -> None:
            assert context.outputs is not None
            assert network[0].weight.grad is not None
            weights.append(network[0].weight.detach().clone())
            told.append((self.name, "update", context.step))

        def on_step_end(self, context: StepContext) -> None:
            told.append((self.name, "end", context.step))

        def on_epoch_end(self, context: EpochContext) -> None:
            told.append((self.name, "epoch", context.step))

    settings = SETTINGS.model_copy(update={"ema": None})
    fit(
        network, data, loss_fn=F.cross_entropy, callbacks=[Listener("a"), Listener("b")],
        settings=settings, max_steps=2, progress=False,
    )  # fmt: skip
    parts = [(who, part) for part in ("begin", "update", "end") for who in "ab"]
    expected: list[Any] = [(who, part, step) for step in (0, 1) for who, part in parts]
    assert told == [*expected, ("a", "epoch", 2), ("b", "epoch", 2)]
    assert not torch.equal(weights[0], weights[2])  # the optimizer was between them
