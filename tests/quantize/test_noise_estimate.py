"""The noise of each layer by backward passes, beside what its quantizers make alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.quantize import Limit, ptq
from slimkit.quantize.layer_choice import noise_estimate
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares, estimated_noise
from slimkit.quantize.outputs.distance import OutputDistance
from slimkit.quantize.targets import resolve_target

Images = Callable[..., Tensor]


def switches_of(model: nn.Module, example: Tensor, calibration: Tensor) -> LayerSwitches:
    quantized = ptq(model, example, calibration=[calibration])
    return LayerSwitches(quantized, target=resolve_target("onnxruntime"))


def measured(model: nn.Module, switches: LayerSwitches, x: Tensor) -> dict[str, float]:
    """Noise / signal of every quantizer with all others off."""
    quantized = switches.quantized
    distance = OutputDistance(model, [sk.Inputs((x,))])

    class Alone(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.off = {other: nn.Identity() for other in quantized.quantizers if other != name}

        def forward(self, x: Tensor) -> Any:
            with quantized.attachment(self.off):
                return quantized.model(x)

    return {name: distance.noise(Alone(name)) for name in quantized.quantizers}


@pytest.fixture
def many_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_estimate, "_PROBES", 32)


@pytest.mark.usefixtures("many_signs")
def test_it_is_what_one_quantizer_alone_makes(small: nn.Module, images: Images) -> None:
    x = images(16, 5)
    switches = switches_of(small, x[:1], x)
    expected = measured(small, switches, x)
    found = estimated_noise(switches, [sk.Inputs((x,))])
    assert list(found.needed) == list(switches.layers)
    assert found.noise == pytest.approx(expected, rel=0.25)


def test_a_caller_without_gradients_gets_the_same(small: nn.Module, images: Images) -> None:
    x = images(4, 5)
    switches = switches_of(small, x[:1], x)
    expected = estimated_noise(switches, [sk.Inputs((x,))])
    with torch.no_grad():
        assert estimated_noise(switches, [sk.Inputs((x,))]) == expected


class Twice(nn.Module):
    """Two outputs, the second a hundred times as large; the first layer is in both, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a(torch.relu(self.a(x)))
        return {"small": self.b(x), "large": 100 * self.c(x)}


@pytest.mark.usefixtures("many_signs")
def test_every_output_counts_the_same() -> None:
    torch.manual_seed(1)
    model, x = Twice().eval(), torch.randn(16, 8)
    switches = switches_of(model, x[:1], x)
    expected = measured(model, switches, x)
    found = estimated_noise(switches, [sk.Inputs((x,))])
    assert found.noise == pytest.approx(expected, rel=0.25)


def test_what_two_layers_share_counts_once() -> None:
    shares = NoiseShares(
        {"x": 1.0, "a": 4.0, "y": 2.0, "b": 8.0},
        {"first": frozenset("xay"), "second": frozenset("yb")},
    )
    assert shares.of(["first"]) == 7.0
    assert shares.of(["first", "second"]) == 15.0
    assert shares.added("second", ["first"]) == 8.0
    # by itself the first makes less noise; for a tenth of the cost it goes back to float first
    assert shares.worst_first({"first": 1, "second": 1}) == ["second", "first"]
    assert shares.worst_first({"first": 1, "second": 10}) == ["first", "second"]


def test_nothing_of_the_network_is_changed(small: nn.Module, images: Images) -> None:
    x = images(4, 5)
    switches = switches_of(small, x[:1], x)
    before = switches.quantized(x).detach()
    estimated_noise(switches, [sk.Inputs((x,))])
    assert torch.equal(switches.quantized(x), before)
    assert all(p.grad is None for p in switches.quantized.parameters())


class Detached(nn.Module):
    """Its outputs have no derivatives, or they are zero."""

    def __init__(self, *, wholly: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wholly = wholly

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        y: Tensor = self.second(x) if self.wholly else self.second(x).round()
        return y.detach() if self.wholly else y


@pytest.mark.parametrize("wholly", [True, False])
def test_without_derivatives_layers_are_measured_one_by_one(wholly: bool) -> None:
    model, x = Detached(wholly=wholly).eval(), 100 * torch.randn(16, 8)
    switches = switches_of(model, x[:1], x)
    if wholly:
        with pytest.raises(RuntimeError):
            estimated_noise(switches, [sk.Inputs((x,))])
    else:
        assert estimated_noise(switches, [sk.Inputs((x,))]).of(switches.layers) == 0
    with pytest.warns(UserWarning, match="no layer is left to quantize"):
        ptq(model, x[:1], calibration=[x], limit=Limit(min_sqnr=150))
