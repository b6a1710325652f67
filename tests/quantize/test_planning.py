from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import InputError, PatternError, PlanError, UnknownNameError
from slimkit.plan import Plan
from slimkit.quantize import NumberFormat, QuantizedModel, QuantPlan, Target, ptq

Images = Callable[..., Tensor]


def quantize(model: nn.Module, x: Tensor, **options: Any) -> QuantizedModel:
    return ptq(model, x[:1], calibration=[x], **options)


def states(q: QuantizedModel) -> dict[str, str]:
    """Address → "" for integer, else the reason."""
    return {decision.address: decision.reason for decision in q.plan.decisions}


def test_every_operation_of_the_small_network_is_integer(small_quantized: QuantizedModel) -> None:
    assert states(small_quantized) == {
        "conv1:conv2d#0": "",
        "depthwise:conv2d#0": "",
        "pointwise:conv2d#0": "",
        ":add#0": "",
        "branch:conv2d#0": "",
        ":cat#0": "",
        ":adaptive_avg_pool2d#0": "",
        "fc:linear#0": "",
    }
    assert small_quantized.plan.folds == (
        ("conv1", "bn1"),
        ("depthwise", "bn2"),
        ("pointwise", "bn3"),
    )
    assert small_quantized.bit_widths() == {
        f"model.{name}": (8, 8) for name in ("conv1", "depthwise", "pointwise", "branch", "fc")
    }


def test_values_are_rounded_behind_the_activation_and_once(small_quantized: QuantizedModel) -> None:
    calls = small_quantized.plan.calls
    assert calls["conv1:conv2d#0"].outputs == {}
    assert calls["relu:relu#0"].outputs == {0: "relu_relu"}
    assert list(calls["conv1:conv2d#0"].inputs) == [0, 1]  # the image, which nothing made
    assert list(calls["pointwise:conv2d#0"].inputs) == [1]
    assert "pool:max_pool2d#0" not in calls
    assert calls["fc:linear#0"].outputs == {}  # logits leave in float


def test_skipped_layers_stay_in_float_and_say_why(small: nn.Module, images: Images) -> None:
    q = quantize(small, images(), skip=["conv1", "Linear"])
    assert states(q)["conv1:conv2d#0"] == "skipped by pattern"
    assert states(q)["fc:linear#0"] == "skipped by pattern"
    assert states(q)["depthwise:conv2d#0"] == ""
    assert "conv1_weight" not in q.quantizers
    assert "skipped by pattern" in q.plan.explain()


def test_weights_per_tensor(small: nn.Module, images: Images) -> None:
    q = quantize(small, images(), granularity="tensor")
    assert q.quantizers["conv1_weight"].scale.shape == ()
    assert len(q(images(2))) == 2


def test_the_plan_survives_json(small_quantized: QuantizedModel, tmp_path: Path) -> None:
    plan = small_quantized.plan
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert isinstance(again, QuantPlan)
    assert again.to_json() == plan.to_json()
    assert again.calls == plan.calls
    assert again.decisions == plan.decisions
    json.dumps(plan.to_json(), allow_nan=False)


def test_a_plan_of_another_network_is_refused_and_changes_nothing(
    small_quantized: QuantizedModel,
) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3))
    before = list(other.named_modules())
    with pytest.raises(PlanError, match="no such module"):
        small_quantized.plan.apply_to(other)
    assert list(other.named_modules()) == before


class Shared(nn.Module):
    """One convolution and one ReLU, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.relu(self.conv(x))))


def test_a_module_called_twice_has_one_weight_and_two_activation_ranges(images: Images) -> None:
    q = quantize(Shared(), images())
    weights = [spec.name for spec in q.plan.quantizers if spec.parameter]
    assert weights == ["conv_weight"]
    assert q.plan.calls["conv:conv2d#0"].inputs[1] == q.plan.calls["conv:conv2d#1"].inputs[1]
    assert {"relu_relu", "relu_relu1"} <= set(q.quantizers)


class Odd(nn.Module):
    """What must stay in float: constants, a normalisation, a product of two computed values."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.offset = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(x))
        y = self.conv(x) + self.offset
        y = F.conv2d(y, torch.softmax(self.conv.weight, 0)) * 2.0
        return y.flatten(2) @ y.flatten(2).mT


def test_reasons_for_what_stays_in_float(images: Images) -> None:
    reasons = states(quantize(Odd().eval(), images()))
    assert reasons["conv:conv2d#0"] == ""
    assert reasons["bn:batch_norm#0"] == "onnxruntime has no integer batch_norm"
    assert reasons[":add#0"] == "it takes a parameter"
    assert reasons[":conv2d#0"] == "its weight is computed, not a parameter"
    assert reasons[":matmul#0"] == "onnxruntime has no integer matmul"
    assert ":mul#0" not in reasons or reasons[":mul#0"]


def test_a_target_is_data(small: nn.Module, images: Images) -> None:
    convs_only = Target(
        "convs",
        activation=NumberFormat(4),
        layers={"conv2d": 0},
        joins=frozenset(),
        pools=frozenset(),
    )
    q = quantize(small, images(), target=convs_only)
    assert set(q.bit_widths().values()) == {(8, 4)}
    assert states(q)["fc:linear#0"] == "convs has no integer linear"
    assert len(torch.unique(q.quantizers["relu_relu"](torch.randn(500)))) <= 16


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"target": "onnxruntim"}, UnknownNameError, "'onnxruntime'"),
        ({"observer": "min_max"}, UnknownNameError, "'minmax'"),
        ({"granularity": "chanel"}, InputError, "'channel'"),
        ({"skip": "layer9.*"}, PatternError, "layer9"),
    ],
)
def test_unknown_choices_name_the_nearest(
    small: nn.Module, images: Images, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        quantize(small, images(), **options)


def test_a_quantized_model_is_not_quantized_again(
    small_quantized: QuantizedModel, images: Images
) -> None:
    with pytest.raises(InputError, match="quantized already"):
        quantize(small_quantized, images())


class FixedFilter(nn.Module):
    """A layer whose weight is a buffer, as a transform into frequencies has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", torch.randn(4, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.filters)


def test_a_weight_may_be_a_buffer() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = FixedFilter()
    q = ptq(model, x, calibration=[x])
    assert q.plan.decisions[0].integer
    with torch.no_grad():
        error = (q(x) - model(x)).norm() / model(x).norm()
    assert 0 < float(error) < 0.02


def test_the_summary_counts_multiply_adds_also_of_layers_that_stay_in_float() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 4)
            self.lstm = nn.LSTM(4, 4, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.lstm(self.first(x))[0][:, -1])

    x = torch.randn(1, 3, 8)
    plan = ptq(Reader().eval(), x, calibration=[x]).plan
    # 3 · 8 · 4 and 4 · 2 in integers; 3 steps with 4 gates of 4 units, each of 4 + 4 inputs
    assert plan.share == pytest.approx((96 + 8) / (96 + 8 + 3 * 16 * 8))
    told = plan.explain()
    assert "2 of 3 operations integer with 21% of the MACs" in told
    assert "float: onnxruntime has no integer lstm" in told
