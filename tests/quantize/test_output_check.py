"""The warning about outputs that rounding ruined."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.quantize import Limit, ptq

Images = Callable[..., Tensor]


class Boxes(nn.Module):
    """Gives those rows whose first value is above the second."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y[y[:, 0] > y[:, 1]]


def spread(model: nn.Module, layer: str, after: str) -> nn.Module:
    """The same function, one channel 3000 times larger between the two layers."""
    with torch.no_grad():
        model.get_submodule(layer).weight[0] *= 3000
        model.get_submodule(layer).bias[0] *= 3000
        model.get_submodule(after).weight[:, 0] /= 3000
    return model


@pytest.fixture
def ruined() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3)
    )
    return spread(model.eval(), "2", "4")


def test_it_names_the_layer_first_that_loses_its_channels(ruined: nn.Module) -> None:
    x = torch.randn(6, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"only .* dB above .* rounded away in 2 \(.* dB\), "):
        q = ptq(ruined, x, calibration=[x])
    (told,) = q.plan.warnings
    assert told in q.plan.explain()
    written = float(told.partition("only ")[2].partition(" dB")[0])
    with torch.no_grad():
        before, after = ruined(x).double(), q(x).double()
    noise = (after - before).square().sum() / before.square().sum()
    assert written == pytest.approx(-10 * float(noise.log10()), abs=0.06)
    assert written < 15


def test_batches_that_can_be_read_only_once_are_judged_too(ruined: nn.Module) -> None:
    with pytest.warns(UserWarning, match="rounded away in 2"):
        ptq(ruined, torch.zeros(1, 3, 8, 8), calibration=(torch.randn(2, 3, 8, 8) for _ in "12"))


def test_what_stays_close_is_not_mentioned(small: nn.Module, images: Images) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not ptq(small, images(4), calibration=images(4)).plan.warnings


def test_a_limit_speaks_for_itself(ruined: nn.Module) -> None:
    x = torch.randn(6, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = ptq(ruined, x, calibration=[x], limit=Limit(min_sqnr=20))
    (told,) = q.plan.warnings
    assert "left in float to keep the outputs at 20 dB" in told


@pytest.mark.parametrize("scale", [0.0, 1.0], ids=["no outputs", "shapes that depend on values"])
def test_outputs_that_cannot_be_compared_are_not_judged(scale: float) -> None:
    torch.manual_seed(0)
    model = Boxes().eval()
    with torch.no_grad():
        model.fc.bias.zero_()
        model.fc.weight[1] = model.fc.weight[0] + 1e-3 * torch.randn(8)
        model.fc.weight *= scale
    x = torch.randn(64, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(ptq(model, x, calibration=[x], weight_bits=2, methods=[]), nn.Module)


def test_the_search_of_settings_is_silent_about_its_trials(ruined: nn.Module) -> None:
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    space = {"observer": sk.search.Choice("minmax", "mse")}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sk.quantize.search_settings(ruined, batches[0], calibration=batches, space=space, trials=2)


class Shares(nn.Module):
    """Zero divided by zero for an input that is rounded to zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.first.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        shared: Tensor = self.second(y / y.sum(1, keepdim=True))
        return shared


def test_outputs_that_are_not_finite_any_more_are_the_worst() -> None:
    model = Shares().eval()
    x = torch.tensor([100.0, 0.01])[:, None].expand(2, 4).contiguous()
    with pytest.warns(UserWarning, match="the outputs are not finite any more; most is rounded"):
        ptq(model, x, calibration=[x])
    q = ptq(model, x, calibration=[x], limit=Limit(min_sqnr=20))
    assert {d.module for d in q.plan.decisions if d.integer} == {"second"}
    with torch.no_grad():
        assert torch.isfinite(q(x)).all()
