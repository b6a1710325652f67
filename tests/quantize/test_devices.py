"""Quantization where the network is: on a GPU everything runs, and gives what the CPU gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.quantize import Limit, Method, PerGroup, QuantizedModel, ptq, qat, sensitivity
from slimkit.quantize.methods.adaround import AdaRound
from slimkit.quantize.methods.gptq import GPTQ
from slimkit.quantize.methods.reconstruction import Reconstruct
from slimkit.quantize.observers.ranges import OBSERVERS
from slimkit.runtime import export
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]

SOME: list[list[str | Method]] = [
    ["equalize", "bias_correction"],
    [GPTQ(behind_activation=True), "bias_correction", "bias_tuning"],
    [AdaRound(iterations=20, positions=512)],
    [Reconstruct(iterations=10)],
]


def name(methods: list[str | Method]) -> str:
    return "+".join(m if isinstance(m, str) else type(m).__name__ for m in methods)


@pytest.fixture
def make(
    small: nn.Module, images: Images, device: torch.device
) -> Callable[..., tuple[QuantizedModel, float]]:
    """Quantizes on the device; also gives how far it is above its noise, in dB."""

    def made(**options: Any) -> tuple[QuantizedModel, float]:
        batches = [images(16, seed) for seed in range(3)]  # on the CPU, where loaders leave them
        model = small.to(device)
        q = ptq(model, images(1), calibration=batches, **options)
        assert {t.device.type for t in q.state_dict().values()} == {device.type}
        x = images(32, 9).to(device)
        with torch.no_grad():
            exact, rounded = model(x), q(x)
        noise = (exact - rounded).square().sum()
        return q, float(10 * torch.log10(exact.square().sum() / noise))

    return made


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_every_observer(make: Callable[..., Any], observer: str) -> None:
    assert make(observer=observer)[1] > 20


@pytest.mark.parametrize("methods", SOME, ids=name)
def test_every_method(make: Callable[..., Any], methods: list[str | Method]) -> None:
    assert make(methods=methods)[1] > 20


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "dynamic"},
        {"mode": "weights", "granularity": PerGroup(16), "weight_bits": 4},
        {"granularity": "tensor"},
        {"target": "onnxruntime-avx2"},
        {"limit": Limit(max_float=0.2)},
        {"limit": Limit(min_sqnr=32)},
    ],
    ids=str,
)
def test_every_mode(make: Callable[..., Any], options: dict[str, Any]) -> None:
    assert make(**options)[1] > 8


@pytest.mark.parametrize("scales", ["observed", "lsq", "pact"])
def test_a_network_trains_where_it_is_and_exports(
    small: nn.Module, images: Images, device: torch.device, scales: str, tmp_path: Path
) -> None:
    teacher = copy.deepcopy(small).to(device)
    q = qat(small.to(device), images(1), calibration=[images(16)], scales=scales).train()
    optimizer = torch.optim.SGD(q.parameters(), lr=1e-3)
    for seed in range(3):
        x = images(16, seed).to(device)
        loss = F.mse_loss(q(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    export(q.eval(), tmp_path / "int8.onnx", images(2).to(device))
    assert next(q.parameters()).device.type == device.type
    assert parity(q, tmp_path / "int8.onnx", [images(32, 5)]).sqnr_db >= 30


def test_layers_are_ranked_as_on_the_cpu(
    small: nn.Module, images: Images, device: torch.device
) -> None:
    batches = [images(16, seed) for seed in range(2)]
    here = sensitivity(copy.deepcopy(small).to(device), images(1), calibration=batches, bits=4)
    there = sensitivity(small, images(1), calibration=batches, bits=4)
    for layer in there.layers:
        assert here.damage(layer, 4) == pytest.approx(there.damage(layer, 4), rel=0.05)


def test_normalised_channels_are_smoothed(device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    nn.init.uniform_(model[0].weight, 0.1, 10)  # type: ignore[arg-type]
    x = torch.randn(64, 16)
    model = model.eval().to(device)
    q = ptq(model, x[:1], calibration=[x], methods=["smoothquant"])
    with torch.no_grad():
        exact, rounded = model(x.to(device)), q(x.to(device))
    assert (exact - rounded).square().sum() < 0.01 * exact.square().sum()
