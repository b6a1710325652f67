from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from slimkit.quantize import QuantizedModel, ptq, qat
from slimkit.runtime import export, open_session
from slimkit.runtime.fusion import fusion_report
from slimkit.runtime.layer_parity import parity_per_layer
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]


def test_everything_runs_as_integers(small_path: Path) -> None:
    fusion = fusion_report(small_path)
    assert fusion.integer_convs == fusion.convs == 4
    assert fusion.integer_adds == fusion.adds == 1
    assert fusion.integer_linears == fusion.linears == 1
    assert fusion.float_nodes == ()


def test_weights_are_int8_and_biases_short_without_float_copies(small_path: Path) -> None:
    graph = onnx.load(small_path).graph
    types = {item.name: numpy_helper.to_array(item).dtype for item in graph.initializer}
    assert types["conv1.weight"] == np.int8
    short = [numpy_helper.to_array(i) for i in graph.initializer if types[i.name] == np.float16]
    assert len(short) == 1  # the biases of all convolutions; the runtime makes int32 of them
    assert types["fc.bias"] == np.int32  # nothing rounds the logits
    floats = [item for item in graph.initializer if types[item.name] == np.float32]
    assert all(len(item.dims) <= 1 for item in floats)  # scales
    operators = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in operators
    assert "Relu" not in operators
    quantized = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert not {node.input[0] for node in quantized} & set(types)


def test_torch_and_runtime_agree(
    small_quantized: QuantizedModel, small_path: Path, images: Images
) -> None:
    result = parity(small_quantized, small_path, [images(64, seed) for seed in (7, 8)])
    assert result.sqnr_db >= 30
    assert result.top1_agreement >= 0.99


def test_single_layers_agree_within_one_step(small_path: Path, images: Images) -> None:
    layers = parity_per_layer(small_path, [images(8, 5)])
    assert layers.problems() == []
    assert len(layers.layers) == 4


def test_any_batch_size(small_quantized: QuantizedModel, small_path: Path, images: Images) -> None:
    session = open_session(small_path)
    for size in (1, 5):
        (logits,) = session.run({"input": images(size).numpy()})
        assert logits.shape == (size, 10)


def test_the_file_is_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.AdaptiveAvgPool2d(1)
    ).eval()
    x = torch.randn(2, 3, 12, 12)
    whole = export(model, tmp_path / "float.onnx", x).bytes
    small = export(ptq(model, x, calibration=[x]), tmp_path / "int8.onnx", x).bytes
    assert small <= 0.25 * whole + 5000


def test_skipped_layers_are_float_in_the_file(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    q = ptq(small, images(1), calibration=[images(8)], skip=["conv1"])
    export(q, tmp_path / "mixed.onnx", images(1))
    fusion = fusion_report(tmp_path / "mixed.onnx")
    assert (fusion.convs, fusion.integer_convs) == (4, 3)
    weights = {i.name: i.data_type for i in onnx.load(tmp_path / "mixed.onnx").graph.initializer}
    assert weights["conv1.weight"] == onnx.TensorProto.FLOAT


def test_a_pruned_network_trains_quantized_and_exports(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    import slimkit as sk

    sk.apply(small, sk.prune.plan(small, images(1), ratio=0.5, round_to=4))
    q = qat(small, images(1), calibration=[images(16)])
    optimizer = torch.optim.SGD(q.parameters(), lr=0.01)
    for seed in range(3):
        optimizer.zero_grad()
        q(images(8, seed)).square().mean().backward()
        optimizer.step()
    q.eval()
    export(q, tmp_path / "int8.onnx", images(1))
    assert fusion_report(tmp_path / "int8.onnx").float_nodes == ()
    assert parity(q, tmp_path / "int8.onnx", [images(32, 3)]).sqnr_db >= 30
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=type(small)()).eval()
    assert torch.equal(again(images(4)), q(images(4)))


class Spatial(nn.Module):
    """Mean over (H, W), split and shuffle, ReLU6 that does not reach its bound."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(x))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([self.left(left), right], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean([2, 3]))


def test_splits_shuffles_and_means_stay_integer(images: Images, tmp_path: Path) -> None:
    q = ptq(Spatial(), images(1), calibration=[images(8)])
    export(q, tmp_path / "spatial.onnx", images(1))
    assert fusion_report(tmp_path / "spatial.onnx").float_nodes == ()
    assert parity(q, tmp_path / "spatial.onnx", [images(16, 2)]).sqnr_db >= 30


def test_a_large_bias_on_dead_weights_fits_into_int32(images: Images, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[0].weight[0] *= 1e-7
        model[0].bias[0] = 50.0
    q = ptq(model, images(1), calibration=[0.001 * images(8)])
    export(q, tmp_path / "bias.onnx", images(1))
    x = 0.001 * images(4, 3)
    (out,) = open_session(tmp_path / "bias.onnx").run({"input": x.numpy()})
    expected = q(x).detach().numpy()
    assert np.abs(out - expected).max() <= 2.1 * q.quantizers["2_conv2d"].scale.item()


@pytest.mark.parametrize("target", ["openvino"])
def test_openvino_reads_the_file(
    small: nn.Module, images: Images, tmp_path: Path, target: str
) -> None:
    pytest.importorskip("openvino")
    q = ptq(small, images(1), calibration=[images(8)], target=target)
    export(q, tmp_path / "int8.onnx", images(1))
    assert parity(q, tmp_path / "int8.onnx", [images(16, 2)], backend="openvino").sqnr_db >= 25


class Uneven(nn.Module):
    """Padded as TensorFlow does it, once with zeros and once with something else."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(nn.functional.pad(x, (1, 0, 1, 0))))
        return self.second(nn.functional.pad(x, (0, 1, 0, 1), value=self.value))


class Pooled(nn.Module):
    """Padded for a max pooling as TensorFlow does it: what is added never comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(torch.relu(self.first(x)), (0, 1, 0, 1), value=-torch.inf)
        return self.second(nn.functional.max_pool2d(x, 3, 2))


def test_padding_with_minus_infinity_before_a_pooling_needs_no_range(
    images: Images, tmp_path: Path
) -> None:
    q = ptq(Pooled(), images(1), calibration=[images(8)])
    assert len(q.activation_quantizers()) == 3  # input, first, second
    export(q, tmp_path / "pooled.onnx", images(1))
    assert not fusion_report(tmp_path / "pooled.onnx").float_nodes
    x = images(4, 3)
    (out,) = open_session(tmp_path / "pooled.onnx").run({"input": x.numpy()})
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(out), q(x))


@pytest.mark.parametrize(("value", "pads"), [(0.0, 0), (1.0, 1)])
def test_padding_with_zeros_becomes_part_of_the_convolution(
    value: float, pads: int, images: Images, tmp_path: Path
) -> None:
    q = ptq(Uneven(value), images(1), calibration=[images(8)])
    export(q, tmp_path / "pad.onnx", images(1))
    operators = [node.op_type for node in onnx.load(tmp_path / "pad.onnx").graph.node]
    assert operators.count("Pad") == pads
    assert operators.count("QuantizeLinear") == 3 + pads
    x = images(4, 3)
    (out,) = open_session(tmp_path / "pad.onnx").run({"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), q(x), atol=1e-6, rtol=1e-6)
