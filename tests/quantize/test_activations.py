"""Networks with squeeze-excite and smooth activation functions: integer from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimkit.inputs import Inputs
from slimkit.plan import Plan
from slimkit.quantize import QuantizedModel, QuantPlan, ptq, qat
from slimkit.quantize.integer.activations import sigmoid
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.noise_estimate import estimated_noise
from slimkit.quantize.quantizers.fixed import ActivationQuantizer
from slimkit.quantize.targets import NumberFormat, resolve_target
from slimkit.runtime import export, fusion_report, open_session

Images = Callable[..., Tensor]


class SqueezeExcite(nn.Module):
    """One block as in MobileNetV3 (hard) or EfficientNet."""

    def __init__(self, *, hard: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.Hardswish(inplace=True) if hard else nn.SiLU(inplace=True)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()
        self.project = nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.act(self.stem(x))
        x = self.act(self.depthwise(first))
        pooled = nn.functional.adaptive_avg_pool2d(x, 1)
        x = self.project(x * self.gate(self.excite(torch.relu(self.squeeze(pooled))))) + first
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module", params=[True, False], ids=["hard", "smooth"])
def quantized(request: pytest.FixtureRequest, images: Images) -> QuantizedModel:
    torch.manual_seed(0)
    model = SqueezeExcite(hard=request.param).eval()
    return ptq(model, images(1), calibration=[images(16)])


@pytest.fixture(scope="module")
def path(
    quantized: QuantizedModel, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    file = tmp_path_factory.mktemp("se") / "se.onnx"
    export(quantized, file, images(1))
    return file


def test_every_operation_is_integer(quantized: QuantizedModel, path: Path) -> None:
    assert [d.address for d in quantized.plan.decisions if not d.integer] == []
    fusion = fusion_report(path)
    assert fusion.complete
    assert fusion.float_nodes == ()
    assert fusion.operators["QLinearMul"] == 3


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "smooth"])
def test_gates_that_work_in_place_have_gradients(images: Images, hard: bool) -> None:
    torch.manual_seed(0)
    in_place = SqueezeExcite(hard=hard).eval()
    apart = SqueezeExcite(hard=hard).eval()
    apart.load_state_dict(in_place.state_dict())
    apart.act.inplace = False
    slopes = []
    for model in (in_place, apart):
        q = qat(model, images(1)).train()
        for _ in range(2):
            q.zero_grad()
            q(images(8)).square().sum().backward()
        slopes.append([p.grad for p in q.model.parameters()])
    for found, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(slope is not None and bool(slope.any()) for slope in slopes[0])


def test_noise_behind_gates_is_estimated(quantized: QuantizedModel, images: Images) -> None:
    switches = LayerSwitches(quantized, target=resolve_target("onnxruntime"))
    shares = estimated_noise(switches, [Inputs((images(8),))])
    assert min(shares.of([layer]) for layer in switches.layers) > 0


def test_it_is_computed_to_the_bit(quantized: QuantizedModel, path: Path, images: Images) -> None:
    x = images(64, 9)
    (out,) = open_session(path).run({"input": x.numpy()})
    with torch.no_grad():
        assert torch.equal(quantized(x), torch.from_numpy(out))


def test_training_and_evaluation_round_the_same_places(
    quantized: QuantizedModel, images: Images
) -> None:
    x = images(32, 9)
    with torch.no_grad():
        exact = quantized(x)
    rounded = quantized(x)
    assert rounded.requires_grad
    assert (exact - rounded).square().sum() < 1e-3 * exact.square().sum()


def test_the_gate_survives_json(quantized: QuantizedModel, tmp_path: Path) -> None:
    quantized.plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert isinstance(again, QuantPlan)
    assert again == quantized.plan
    assert sum(rule.gate is not None for rule in again.calls.values()) == 2


def test_a_gate_stays_rounded_when_another_layer_goes_back_to_float(images: Images) -> None:
    torch.manual_seed(0)
    model = SqueezeExcite(hard=False).eval()
    whole, left = (ptq(model, images(1), calibration=[images(16)], skip=s) for s in ((), "fc"))
    switches = LayerSwitches(whole, target=resolve_target("onnxruntime"))
    with torch.no_grad(), switches.set(["fc"]) as network:
        assert torch.equal(network(images(4)), left(images(4)))
    assert any(rule.gate for rule in left.plan.calls.values())


def test_a_gate_has_the_grid_of_its_range_without_data(quantized: QuantizedModel) -> None:
    gates = [rule.gate for rule in quantized.plan.calls.values() if rule.gate]
    for name in gates:
        assert quantized.quantizers[name].scale.item() == 1 / 256
        assert quantized.quantizers[name].zero_point.item() == 0


def test_the_table_of_the_sigmoid_is_near_the_function() -> None:
    reads, writes = ActivationQuantizer(NumberFormat(8)), ActivationQuantizer(NumberFormat(8))
    reads._set_range(torch.tensor(-6.0), torch.tensor(5.0))
    writes._set_range(torch.tensor(0.0), torch.tensor(255 / 256))
    x = (torch.arange(256) - reads.zero_point) * reads.scale
    assert (sigmoid(reads, writes) / 256 - torch.sigmoid(x)).abs().max() <= 0.5001 / 256


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).sigmoid()


def test_scores_that_leave_the_network_keep_their_digits(images: Images) -> None:
    q = ptq(Detector(), images(1), calibration=[images(8)])
    reasons = {d.address: d.reason for d in q.plan.decisions}
    assert reasons[":sigmoid#0"] == "no integer operation reads it"
    assert ":sigmoid#0" not in q.plan.calls
