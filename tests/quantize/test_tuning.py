"""End-to-end tuning: scales and biases learn from the outputs, integers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import InputError
from slimkit.quantize import QuantizedModel, ptq
from slimkit.quantize.quantizers import WeightQuantizer
from slimkit.quantize.tuning import Tune
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


def integers(q: QuantizedModel) -> dict[str, Tensor]:
    found = {}
    for spec in q.plan.quantizers:
        quantizer = q.quantizers[spec.name]
        if isinstance(quantizer, WeightQuantizer) and spec.parameter is not None:
            weight = q.model.get_parameter(spec.parameter).detach()
            scale = quantizer.refresh(weight)
            found[spec.parameter] = (
                quantizer(weight) / scale.reshape(-1, *[1] * (weight.dim() - 1))
            ).round()
    return found


def test_outputs_come_nearer_for_images_that_were_not_seen(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel]
) -> None:
    x = images(64, 9)
    before = noise(small, quantized("gptq", "bias_correction"), x)
    after = noise(small, quantized("gptq", "bias_correction", "tune"), x)
    assert after < 0.8 * before


def test_integers_stay_and_scales_and_biases_move(quantized: Callable[..., QuantizedModel]) -> None:
    before, after = quantized("gptq"), quantized("gptq", Tune(steps=10))
    old, new = integers(before), integers(after)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    for spec in after.plan.quantizers:
        if spec.parameter is not None:
            assert spec.scale == "fixed"
            ratio = after.quantizers[spec.name].scale / before.quantizers[spec.name].scale
            assert (ratio - 1).abs().max() < 0.05
            assert (ratio != 1).any()
    moved = (after.model.fc.bias - before.model.fc.bias).abs()
    assert 0 < moved.max() < 0.1


def test_weights_that_no_method_fixed_are_fixed_as_they_are_rounded(
    quantized: Callable[..., QuantizedModel],
) -> None:
    old, new = integers(quantized()), integers(quantized(Tune(steps=5)))
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_one_scale_becomes_the_one_of_least_squares() -> None:
    """Of w = (3, 1.4) and scale 1 come the integers (3, 1); the best scale is known."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.4]]))
    x = torch.rand(400, 2)
    q = ptq(
        layer.eval(), x[:1], calibration=[x], weight_bits=3,
        methods=[Tune(steps=300, lr=0.01, images=400)],
    )  # fmt: skip
    seen = x[:300]
    exact, given = seen @ layer.weight[0], seen @ torch.tensor([3.0, 1.0])
    best = (exact @ given) / given.square().sum()
    scale = q.quantizers[q.plan.decisions[0].weight].scale  # type: ignore[index]
    assert float(scale) == pytest.approx(float(best), rel=0.01)


def test_pruned_weights_stay_zero(
    small: nn.Module, quantized: Callable[..., QuantizedModel]
) -> None:
    with torch.no_grad():
        small.pointwise.weight[3] = 0  # type: ignore[index, operator, union-attr]
    q = quantized("gptq", "tune", model=small)
    assert not q.model.pointwise.weight[3].any()


def test_what_does_not_help_other_images_is_undone(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel]
) -> None:
    before, after = quantized("gptq"), quantized("gptq", Tune(steps=3, lr=5.0))
    x = images(8, 9)
    assert torch.equal(before(x), after(x))
    assert torch.equal(before.model.fc.bias, after.model.fc.bias)


def test_parameters_learn_as_before(quantized: Callable[..., QuantizedModel]) -> None:
    q = quantized(Tune(steps=2))
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
    with pytest.warns(UserWarning, match="nothing is tuned"):
        after = quantized("gptq", Tune(steps=2), model=model)
    before = quantized("gptq", model=model)
    assert torch.equal(before(images(8, 9)), after(images(8, 9)))


def test_one_image_cannot_be_divided(small: nn.Module, images: Images) -> None:
    with pytest.warns(UserWarning, match="nothing is tuned"):
        ptq(small, images(1), calibration=[images(1)], methods=["tune"])


def test_a_tuned_network_is_saved_and_exported(
    small: nn.Module, images: Images, quantized: Callable[..., QuantizedModel], tmp_path: Path
) -> None:
    q = quantized("gptq", "bias_correction", Tune(steps=20))
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)()).eval()
    assert torch.equal(again(images(4)), q(images(4)))
    export(q, tmp_path / "int4.onnx", images(2))
    assert parity(q, tmp_path / "int4.onnx", [images(32, 5)]).sqnr_db >= 30


@pytest.mark.parametrize("field", ["steps", "batch", "lr", "images"])
def test_mistakes_are_named(field: str) -> None:
    with pytest.raises(InputError, match=field):
        Tune(**{field: 0})
