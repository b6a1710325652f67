"""Bias tuning: biases learn from the outputs, everything else stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.quantize import QuantizedModel, ptq
from slimkit.quantize.methods.bias_tuning import BiasTuning
from slimkit.quantize.methods.interface import Work
from slimkit.runtime import export
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]


@pytest.fixture
def quantized(small: nn.Module, images: Images) -> Callable[..., QuantizedModel]:
    """Quantizes to 4 bits with given methods."""

    def make(*methods: Any, model: nn.Module = small, **options: Any) -> QuantizedModel:
        batches = [images(16, seed) for seed in range(4)]
        options = {"weight_bits": 4, **options}
        return ptq(model, images(1), calibration=batches, methods=methods, **options)

    return make


@torch.no_grad()
def noise(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    exact = model(x)
    return float((quantized(x) - exact).square().sum() / exact.square().sum())


def test_outputs_come_nearer_for_images_that_were_not_seen(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel]
) -> None:
    x = images(64, 9)
    before = noise(small, quantized(), x)
    after = noise(small, quantized("bias_tuning"), x)
    assert after < 0.9 * before


@pytest.mark.parametrize("mode", ["dynamic", "weights"])
def test_every_mode_gains(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel], mode: str
) -> None:
    x = images(64, 9)
    before = noise(small, quantized(mode=mode), x)
    assert noise(small, quantized("bias_tuning", mode=mode), x) < 0.9 * before


def test_biases_move_and_nothing_else_does(quantized: Callable[..., QuantizedModel]) -> None:
    before, after = quantized().state_dict(), quantized("bias_tuning").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    layers = ("conv1", "depthwise", "pointwise", "branch", "fc")
    assert changed == {f"model.{layer}.bias" for layer in layers}


def test_a_lost_bias_is_found_again() -> None:
    """A shift in the middle of the network shows in the outputs, and is taken out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    x = torch.randn(400, 8)

    @dataclass(frozen=True)
    class Shift:
        when: ClassVar[Literal["before", "after"]] = "after"

        def run(self, work: Work) -> None:
            assert work.reference is not None
            with torch.no_grad():
                work.quantized.model[0].bias += 0.1  # type: ignore[index, operator, union-attr]

    tuning = BiasTuning(steps=300, lr=0.05, images=400)
    q = ptq(model, x[:1], calibration=[x], methods=[Shift(), tuning])
    assert (q.model[0].bias - model[0].bias).abs().max() < 0.05


def test_what_does_not_help_other_images_is_undone(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel]
) -> None:
    before, after = quantized("gptq"), quantized("gptq", BiasTuning(steps=3, lr=5.0))
    x = images(8, 9)
    assert torch.equal(before(x), after(x))
    assert torch.equal(before.model.fc.bias, after.model.fc.bias)


def test_parameters_learn_as_before(quantized: Callable[..., QuantizedModel]) -> None:
    q = quantized(BiasTuning(steps=2))
    assert all(p.requires_grad and p.grad is None for p in q.model.parameters())


class Detached(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


class Counting(nn.Module):
    """So many rows as the numbers say, as a detector has boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.flatten(1))
        return y[: int(1000 * y.abs().sum()) % 7 + 1]


@pytest.mark.parametrize("network", [Detached, Counting])
def test_a_network_that_cannot_be_tuned_is_left_alone(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel], network: type
) -> None:
    model = (Detached(small) if network is Detached else Counting()).eval()
    with pytest.warns(UserWarning, match="no bias is tuned"):
        after = quantized("gptq", BiasTuning(steps=2), model=model)
    before = quantized("gptq", model=model)
    assert torch.equal(before(images(8, 9)), after(images(8, 9)))


def test_without_biases_there_is_nothing_to_do() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x = torch.randn(32, 8)
    before, after = (ptq(model, x[:1], calibration=[x], methods=m) for m in ([], ["bias_tuning"]))
    assert torch.equal(before(x), after(x))


def test_one_image_cannot_be_divided(small: nn.Module, images: Images) -> None:
    with pytest.warns(UserWarning, match="no bias is tuned"):
        ptq(small, images(1), calibration=[images(1)], methods=["bias_tuning"])


def test_a_tuned_network_is_saved_and_exported(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    q = quantized("gptq", "bias_correction", BiasTuning(steps=20))
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)()).eval()
    assert torch.equal(again(images(4)), q(images(4)))
    export(q, tmp_path / "int4.onnx", images(2))
    assert parity(q, tmp_path / "int4.onnx", [images(32, 5)]).sqnr_db >= 30


@pytest.mark.parametrize("field", ["steps", "batch", "lr", "images"])
def test_mistakes_are_named(field: str) -> None:
    with pytest.raises(InputError, match=field):
        BiasTuning(**{field: 0})
