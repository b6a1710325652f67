"""Few bits, groups, and what a file needs per channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from slimkit.errors import ExportError, PlanError
from slimkit.quantize import PerGroup, QuantizedModel, ptq
from slimkit.quantize.scales import weight_grid
from slimkit.quantize.targets import TARGETS, NumberFormat
from slimkit.runtime import export, fusion_report, open_session
from slimkit.runtime.fake_quantize import fake_quantize, on_grid
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]
FOUR = NumberFormat(4, signed=True, symmetric=True)


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {item.name: item for item in onnx.load(path).graph.initializer}


def grouped(granularity: str | PerGroup = "group") -> QuantizedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 10))
    x = torch.randn(4, 96)
    return ptq(model, x, mode="weights", granularity=granularity, weight_bits=4)


def test_each_group_has_the_scale_of_its_largest_weight() -> None:
    weight = torch.randn(5, 64)
    scale, _ = weight_grid(weight, FOUR, 0, blocks=2)
    expected = weight.reshape(5, 2, 32).abs().amax(2) / 7
    torch.testing.assert_close(scale, expected)
    rounded = fake_quantize(weight, scale, torch.zeros(5, 2), qmin=-7, qmax=7, axis=0)
    wide = scale.numpy().repeat(32, 1)
    reference = np.clip(np.rint(weight.numpy() / wide), -7, 7) * wide
    np.testing.assert_array_equal(rounded.numpy(), reference)


def test_groups_are_packed_two_to_a_byte_and_scaled_by_block(tmp_path: Path) -> None:
    q = grouped(granularity=PerGroup(32))
    assert q.quantizers["0_weight"].scale.shape == (40, 3)
    assert q.quantizers["2_weight"].scale.shape == (10,)  # 40 inputs are no groups of 32
    export(q, tmp_path / "group.onnx", torch.randn(4, 96))
    stored = initializers(tmp_path / "group.onnx")["0.weight"]
    assert stored.data_type == TensorProto.INT4
    assert len(stored.raw_data) == 96 * 40 // 2
    quantizer = q.quantizers["0_weight"]
    scale, zero = (t.numpy().repeat(32, 1) for t in (quantizer.scale, quantizer.zero_point))
    weight = q.model[0].weight.detach().numpy()
    levels = numpy_helper.to_array(stored).astype(np.int8)
    np.testing.assert_array_equal(levels, np.clip(np.rint(weight / scale) + zero, -8, 7).T)


def test_the_runtime_multiplies_by_packed_integers(tmp_path: Path) -> None:
    q = grouped(granularity=PerGroup(32))
    export(q, tmp_path / "group.onnx", torch.randn(4, 96))
    assert fusion_report(tmp_path / "group.onnx").operators["MatMulNBits"] == 1  # 40 is too odd
    assert parity(q, tmp_path / "group.onnx", [torch.randn(8, 96)]).sqnr_db >= 30


def test_pointwise_convolutions_have_groups_too(images: Images, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 1))
    q = ptq(model, images(1), mode="weights", granularity=PerGroup(16), weight_bits=4)
    assert q.quantizers["2_weight"].scale.shape == (8, 2)
    export(q, tmp_path / "conv.onnx", images(1))
    assert initializers(tmp_path / "conv.onnx")["2.weight"].data_type == TensorProto.INT4
    assert parity(q, tmp_path / "conv.onnx", [images(4, 2)]).sqnr_db >= 60


@pytest.mark.parametrize("zero_points", [True, False])
def test_tables_and_layers_in_float_have_zero_points_too(zero_points: bool, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(50, 24), nn.Linear(24, 16)
            self.conv = nn.ConvTranspose1d(16, 8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.fc(self.table(ids)).transpose(1, 2))

    torch.manual_seed(0)
    ids = torch.randint(50, (4, 7))
    target = TARGETS.get("onnxruntime")
    target = target if zero_points else replace(target, zero_points=frozenset())
    model = Net()
    with torch.no_grad():
        model.table.weight += 2.0
    q = ptq(model, ids, mode="weights", weight_bits=4, target=target)
    noise = (q.quantizers["table_weight"](model.table.weight) - model.table.weight).abs().mean()
    assert bool(noise < 0.1) == zero_points  # half of the levels are of no use to them without
    export(q, tmp_path / "four.onnx", ids)
    kinds = [t.data_type for t in initializers(tmp_path / "four.onnx").values()]
    assert kinds.count(TensorProto.INT4) == (6 if zero_points else 3)
    assert parity(q, tmp_path / "four.onnx", [torch.randint(50, (4, 7))]).sqnr_db >= 40


@pytest.mark.parametrize("bits", [3, 6])
def test_few_bits_between_integer_activations_run_as_integers_to_the_bit(
    images: Images, tmp_path: Path, bits: int
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    q = ptq(model, images(1), calibration=[images(8)], weight_bits=bits)
    export(q, tmp_path / "few.onnx", images(1))
    kind = TensorProto.INT4 if bits <= 4 else TensorProto.INT8
    stored = initializers(tmp_path / "few.onnx")
    assert stored["0.weight"].data_type == stored["2.weight"].data_type == kind
    assert fusion_report(tmp_path / "few.onnx").integer_convs == 2
    x = images(8, 3)
    (out,) = open_session(tmp_path / "few.onnx").run({"input": x.numpy()})
    with torch.no_grad():
        assert torch.equal(q(x), torch.from_numpy(out))


def test_bits_by_layer_and_by_mode(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    q = ptq(model, torch.randn(4, 32), mode="dynamic", weight_bits={"0": 3})
    assert q.bit_widths() == {"model.0": (3, 8), "model.2": (8, 8)}
    export(q, tmp_path / "mixed.onnx", torch.randn(4, 32))
    stored = initializers(tmp_path / "mixed.onnx")
    assert stored["0.weight"].data_type == TensorProto.INT4
    assert stored["2.weight"].data_type == TensorProto.INT8
    assert fusion_report(tmp_path / "mixed.onnx").integer_linears == 2


def test_four_bits_need_operator_set_21(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"opset: .*21, not 20 \(use opset=21"):
        export(grouped(), tmp_path / "old.onnx", torch.randn(4, 96), opset=20)


def test_activations_of_few_bits_saturate_where_torch_does(images: Images, tmp_path: Path) -> None:
    target = replace(TARGETS.get("generic"), activation=NumberFormat(4))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    q = ptq(model, images(1), calibration=[0.5 * images(8)], target=target)
    export(q, tmp_path / "four.onnx", images(1))
    assert parity(q, tmp_path / "four.onnx", [images(8, 2)]).sqnr_db >= 25


def test_a_plan_with_other_groups_is_refused() -> None:
    plan = grouped(granularity=PerGroup(32)).plan
    with pytest.raises(PlanError, match="3 groups"):
        plan.apply_to(nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)))


def test_scales_on_the_grid_are_a_little_larger() -> None:
    scale = torch.rand(1000) * 10.0 ** torch.randint(-6, 3, (1000,))
    snapped = on_grid(scale)
    assert (snapped >= scale).all()
    counts = scale >= snapped.max() / 64
    assert (snapped[counts] <= scale[counts] * 2 ** (1 / 16) * 1.0001).all()
    assert (snapped[~counts] <= scale[~counts] * 2).all()
    assert torch.equal(on_grid(snapped), snapped)
    assert len(snapped.unique()) < 16 * 7 + 30


@pytest.mark.parametrize("bits", [8, 4])
def test_channels_of_hardly_any_weight_keep_their_bias(tmp_path: Path, bits: int) -> None:
    """Their scales become wider in the file, and are looked up there as all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[::2] *= 1e-9
        model[0].bias[::2] += 50.0
    x = torch.rand(2, 8, 6, 6) / 100
    q = ptq(model, x, calibration=[x], weight_bits=bits, methods=[])
    export(q, tmp_path / "int8.onnx", x)
    initial = onnx.load(tmp_path / "int8.onnx").graph.initializer
    assert max((math.prod(i.dims) for i in initial if i.data_type == 1), default=0) < 32
    assert fusion_report(tmp_path / "int8.onnx").float_nodes == ()
    assert parity(q, tmp_path / "int8.onnx", [x]).sqnr_db >= 40
    (runtime,) = open_session(tmp_path / "int8.onnx").run([x.numpy()])
    with torch.no_grad():
        wanted = model(x)
    allowed = 0.02 if bits == 8 else 0.05
    assert (torch.from_numpy(runtime) - wanted).abs().max() <= allowed * wanted.abs().max()


def test_a_channel_costs_three_bytes_beside_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 1, groups=64) for _ in range(8)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())], nn.Flatten())
    for layer in layers:
        nn.init.normal_(layer.weight)
    x = torch.randn(2, 64, 4, 4)
    q = ptq(model, x, calibration=[x])
    export(q, tmp_path / "thin.onnx", x)
    stored = initializers(tmp_path / "thin.onnx")
    beside = sum(len(t.raw_data) for t in stored.values() if t.data_type != TensorProto.INT8)
    distinct = torch.cat([q.quantizers[f"{2 * i}_weight"].scale for i in range(8)]).unique()
    assert beside <= 8 * 64 * 3 + 4 * len(distinct) + 200
    assert fusion_report(tmp_path / "thin.onnx").integer_convs == 8
    with torch.no_grad():
        (out,) = open_session(tmp_path / "thin.onnx").run({"input": x.numpy()})
        assert torch.equal(q(x), torch.from_numpy(out))
