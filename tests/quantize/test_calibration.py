from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import DataError, InputError
from slimkit.quantize import OBSERVERS, NumberFormat, Percentile, QuantizedModel, calibration, ptq
from slimkit.quantize.calibration import attach, calibrate

Images = Callable[..., Tensor]


@torch.no_grad()
def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


@pytest.mark.parametrize("observer", OBSERVERS.names())
def test_outputs_stay_near_the_float_network(
    small: nn.Module, images: Images, observer: str
) -> None:
    before = copy.deepcopy(small.state_dict())
    batches = [images(16, seed) for seed in range(4)]
    q = ptq(small, images(1), calibration=batches, observer=observer)
    x = images(32, 99)
    with torch.no_grad():
        assert sqnr(small(x), q(x)) > 20
        assert not torch.equal(small(x), q(x))
    assert not q.training
    assert all(torch.equal(before[key], value) for key, value in small.state_dict().items())


def test_ranges_are_those_of_the_float_network(small: nn.Module, images: Images) -> None:
    q = ptq(small, images(1), calibration=[images(8)])
    stem = q.model.get_submodule("conv1")
    with torch.no_grad():
        values = stem(images(8)).relu()
    quantizer = q.quantizers["relu_relu"]
    assert quantizer.low.item() == 0.0
    assert quantizer.high.item() == pytest.approx(values.max().item(), rel=1e-6)
    assert quantizer.scale.item() == pytest.approx(values.max().item() / 255, rel=1e-6)


def test_an_observer_with_settings_is_used_for_every_activation_and_named_in_the_plan(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    chosen = Percentile(percentile=90.0)
    q = ptq(small, images(1), calibration=[images(8)], observer=chosen)
    whole = ptq(small, images(1), calibration=[images(8)], observer=Percentile(percentile=100.0))
    for name, quantizer in q.activation_quantizers().items():
        assert quantizer.high < whole.quantizers[name].high
    assert q.plan.observer == "percentile(percentile=90.0)"
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)())
    assert isinstance(again, QuantizedModel)
    assert again.plan.observer == q.plan.observer
    with pytest.raises(InputError, match="not seen any data"):  # each quantizer has its own
        chosen.range(NumberFormat())


def test_what_counts_as_a_batch(small: nn.Module, images: Images) -> None:
    x = images(4)
    labels = torch.zeros(4)
    expected = ptq(small, x, calibration=[x]).state_dict()
    for batches in ([(x, labels)], [[x, labels]], [sk.Inputs((x,))], x, iter([x])):
        state = ptq(small, x, calibration=batches).state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


class Loader:
    def __init__(self, batches: list[Tensor], role: str) -> None:
        self.batches, self.role = batches, role

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_test_data_is_refused(small: nn.Module, images: Images) -> None:
    assert ptq(small, images(1), calibration=Loader([images(4)], "train"))
    with pytest.raises(DataError, match="test data"):
        ptq(small, images(1), calibration=Loader([images(4)], "test"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([torch.zeros(0, 3, 16, 16)], "empty"),
        ([torch.zeros(3, 16, 16)], r"\(3, 16, 16\)"),
        ([torch.zeros(2, 1, 16, 16)], r"\(2, 1, 16, 16\)"),
        ([torch.full((2, 3, 16, 16), torch.nan)], "NaN"),
        ([torch.full((2, 3, 16, 16), torch.inf)], "infinity"),
        ([torch.zeros(2, 3, 1, 1)], "does not go through"),
        (["image.png"], "batch 1: .* got a str"),
    ],
)
def test_bad_calibration_data_is_named(small: nn.Module, batches: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ptq(small, torch.zeros(1, 3, 16, 16), calibration=batches)


def test_fewer_batches_than_asked_for(small: nn.Module, images: Images) -> None:
    assert ptq(small, images(1), calibration=[images(4)] * 3, batches=2)
    with pytest.raises(DataError, match="3 batches, 4 were asked for"):
        ptq(small, images(1), calibration=[images(4)] * 3, batches=4)
    with pytest.raises(InputError, match="batches"):
        ptq(small, images(1), calibration=[images(4)], batches=0)


def test_weights_that_are_not_finite_are_named(small: nn.Module, images: Images) -> None:
    with torch.no_grad():
        small.get_parameter("pointwise.weight")[0] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        ptq(small, images(1), calibration=[images(4)])


def test_constant_images_give_finite_scales(small: nn.Module) -> None:
    x = torch.zeros(2, 3, 16, 16)
    q = ptq(small, x, calibration=[x])
    assert all(torch.isfinite(value).all() for value in q.state_dict().values())
    assert torch.isfinite(q(torch.randn(2, 3, 16, 16))).all()


class Branching(nn.Module):
    """The second convolution runs for large images only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if x.shape[-1] > 8 else y


def test_a_layer_that_never_runs_is_left_in_float_and_named(tmp_path: Path) -> None:
    model = Branching()
    with pytest.warns(UserWarning, match="second:conv2d#0 did not run"):
        q = ptq(model, torch.randn(1, 3, 16, 16), calibration=[torch.randn(2, 3, 8, 8)])
    assert "second_weight" not in q.quantizers
    assert "second:conv2d#0 did not run during calibration" in q.plan.warnings[0]
    assert q.bit_widths() == {"model.first": (8, 8)}
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=Branching())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), q(x))


def test_save_and_load_on_a_fresh_network(
    small_quantized: QuantizedModel, small: nn.Module, images: Images, tmp_path: Path
) -> None:
    sk.save(small_quantized, tmp_path / "saved")
    fresh = type(small)()
    again = sk.load(tmp_path / "saved", model=fresh).eval()
    assert torch.equal(again(images(4)), small_quantized(images(4)))
    assert torch.equal(copy.deepcopy(again)(images(4)), again(images(4)))


def test_earlier_plans_stay_with_the_model(small: nn.Module, images: Images) -> None:
    from slimkit.graph.folding import FusePlan
    from slimkit.plan import applied_plans

    fused = sk.apply(small, FusePlan((("conv1", "bn1"),)))
    q = ptq(fused, images(1), calibration=[images(4)])
    assert [plan.kind for plan in applied_plans(q)] == ["fuse", "quantize"]


def test_runs_on_every_device(small: nn.Module, images: Images, device: torch.device) -> None:
    q = ptq(small.to(device), images(1), calibration=[images(4)])
    x = images(4)
    here = q(x.to(device))
    assert here.device.type == device.type
    assert sqnr(q.cpu()(x), here.cpu()) > 25


class Sizes(nn.Module):
    """Remembers how many examples came; ``least`` is as many as it can do with."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.least, self.seen = least, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < self.least:
            raise ValueError("too few")
        self.seen.append(len(x))
        return self.conv(x)


@pytest.mark.parametrize(
    ("observer", "least", "expected"),
    [
        ("minmax", 1, [8, 3, 3, 2, 3]),
        ("mse", 1, [8, 3, 3, 2, 3]),
        ("mean_of_maxima", 1, [8, 8, 3]),
        ("minmax", 3, [8, 3, 3, 8, 3]),
        ("minmax", 8, [8, 8]),
    ],
)
def test_large_batches_go_through_in_parts(
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
    observer: str,
    least: int,
    expected: list[int],
) -> None:
    monkeypatch.setattr(calibration, "_LARGEST_ACTIVATION", 3 * 4 * 14 * 14 * 4)
    data = [images(8, 0), images(8, 1), images(3, 2)]
    data = data[: 2 if least == 8 else 3]
    model = Sizes(least)
    quantized = attach(
        model, images(8), target="onnxruntime", granularity="channel", observer=observer, skip=()
    )
    inner = quantized.model
    inner.seen.clear()
    calibrate(quantized, [sk.Inputs((x,)) for x in data], observer=observer)
    assert inner.seen == expected
    assert not any(q._forward_pre_hooks for q in quantized.quantizers.values())
    if observer == "minmax":
        low, high = (getattr(quantized.quantizers["input"], end).item() for end in ("low", "high"))
        whole = torch.cat(data)
        assert (low, high) == (whole.min().item(), whole.max().item())


def test_calibration_that_is_no_batches_is_named(small: nn.Module) -> None:
    with pytest.raises(InputError, match="calibration: expected something to iterate over, got 3"):
        ptq(small, torch.zeros(1, 3, 16, 16), calibration=3)  # type: ignore[arg-type]
