"""All state of quantizers is in buffers and parameters: who restores these restores everything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.quantize import QuantizedModel, qat
from slimkit.train import TrainSettings, fit

SCALES = ("observed", "lsq", "pact")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def data(count: int = 8, scale: float = 3.0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            scale * torch.randn(8, 3, 8, 8, generator=generator),
            torch.randint(0, 4, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def steps(model: QuantizedModel, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def observing(scales: str, count: int = 4) -> QuantizedModel:
    return qat(net(), data()[0][0], observe_steps=count, scales=scales, weight_bits=4)


@pytest.mark.parametrize("scales", SCALES)
def test_training_goes_on_after_a_reload_in_the_middle_of_observing(scales: str) -> None:
    whole, first = observing(scales), observing(scales)
    steps(whole, data(2))
    steps(first, data(2))
    second = observing(scales, 1)
    steps(second, data(1, scale=9.0))  # other ranges, other step sizes, nothing left to observe
    second.load_state_dict(first.state_dict())
    for model in (whole, second):
        steps(model, data(6)[2:])
    assert equal(whole, second)


@pytest.mark.parametrize("scales", SCALES)
def test_a_deep_copy_in_the_middle_of_observing_is_independent_and_equal(scales: str) -> None:
    model = observing(scales)
    steps(model, data(2))
    twin = copy.deepcopy(model)
    before = state(twin)
    steps(model, data(6)[2:])
    assert all(torch.equal(before[k], v) for k, v in state(twin).items())
    steps(twin, data(6)[2:])
    assert equal(model, twin)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("count", [2, 20])
def test_tensors_put_back_in_place_undo_everything(scales: str, count: int) -> None:
    """What a trial of precisions does; ``copy_`` tells no module that its buffers changed."""
    model, twin = observing(scales, count), observing(scales, count)
    held = state(model)
    steps(model, data(4, scale=9.0))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(held[name])
    for each in (model, twin):
        steps(each, data(6))
    assert equal(model, twin)


@pytest.mark.parametrize("scales", SCALES)
def test_trials_of_precision_leave_quantizers_as_they_were(
    scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimkit.train.precision.multiplies_bf16", lambda _device: True)
    settings = TrainSettings(epochs=2, lr=1e-3, optimizer="adamw", precision="auto")
    model = observing(scales, 4)
    fit(model, data(), loss_fn=nn.CrossEntropyLoss(), settings=settings, progress=False)
    assert int(model.observer_steps_left) == 0
    for quantizer in model.activation_quantizers().values():
        assert float(quantizer.scale) != 1.0
        assert int(quantizer.observed) == 4
    x = data(1)[0][0]
    sk.save(model.eval(), tmp_path / "model")
    loaded: Any = sk.load(tmp_path / "model", model=net()).eval()
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_step_sizes_are_initialised_once() -> None:
    model = observing("lsq")
    steps(model, data(2))
    twin = observing("lsq")
    twin.load_state_dict(model.state_dict())
    twin.train()(data()[0][0])
    name = next(n for n, _ in model.named_buffers() if n.endswith(".start"))
    assert torch.equal(dict(model.named_buffers())[name], dict(twin.named_buffers())[name])


@pytest.mark.parametrize("scales", ["lsq", "pact"])
def test_whether_an_offset_or_clip_learns_follows_from_the_range(scales: str) -> None:
    """Not from ``requires_grad``, which freezing and thawing a network sets at will."""
    model, twin = observing(scales, 2), observing(scales, 2)
    for each in (model, twin):
        steps(each, data(2))
    twin.requires_grad_(True)
    for each in (model, twin):
        steps(each, data(4)[2:])
    assert equal(model, twin)


def test_an_export_right_after_loading_rounds_activations() -> None:
    model = observing("observed", 2)
    steps(model, data(2))
    fresh = observing("observed", 2)
    fresh.load_state_dict(model.state_dict())
    program = torch.export.export(fresh.eval(), (data(1)[0][0],), strict=False)
    rounded = [n for n in program.graph.nodes if "fake_quantize" in str(n.target)]
    assert len(rounded) == len(model.quantizers)
