from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from slimkit.errors import ExportError, InputError
from slimkit.quantize import TARGETS, NumberFormat, PerGroup, QuantizedModel, Target, ptq
from slimkit.quantize.targets import resolve_target
from slimkit.runtime import export
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]


def quantize(model: nn.Module, x: Tensor, **options: Any) -> QuantizedModel:
    return ptq(model, x[:1], calibration=[x], **options)


def written(q: QuantizedModel, path: Path, x: Tensor) -> onnx.GraphProto:
    export(q, path, x[:1])
    return onnx.load(path).graph


@pytest.fixture(scope="module")
def tensorrt(
    small_quantized: QuantizedModel, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QuantizedModel, Path]:
    """The network of ``small_quantized``, quantized for TensorRT, and its file."""
    q = quantize(small_quantized.model, images(16), target="tensorrt")
    path = tmp_path_factory.mktemp("trt") / "trt.onnx"
    export(q, path, images(1))
    return q, path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "mode": "dynamic"}, r"mode: tensorrt has no 'dynamic' \(use 'stat"),
        ({"target": "tensorrt", "weight_bits": 4}, "4-bit weights .the nearest is 8"),
        ({"target": "litert", "mode": "weights", "granularity": "group"}, "'channel', 'tensor'"),
        ({"mode": "dinamic"}, "unknown mode 'dinamic' .did you mean 'dynamic'"),
        ({"granularity": "group"}, "granularity: integer kernels.*mode='weights'"),
        ({"mode": "weights", "granularity": PerGroup(48)}, "the nearest is 64"),
        ({"weight_bits": 9}, "9-bit weights .the nearest is 8"),
    ],
)
def test_what_a_target_cannot_express_names_the_nearest_choice(
    small: nn.Module, images: Images, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(small, images(2), **options)


def test_static_scales_need_data(small: nn.Module, images: Images) -> None:
    with pytest.raises(InputError, match=r"calibration: .*mode='dynamic'"):
        ptq(small, images(1))


def test_a_target_is_checked_when_it_is_made() -> None:
    with pytest.raises(InputError, match="weight: weights cannot be asymmetric uint8"):
        Target("odd", weight=NumberFormat(8))
    with pytest.raises(InputError, match=r"zero_points: 8-bit weights .*of up to 4 bits can"):
        Target("odd", zero_points=frozenset({4, 8}))
    with pytest.raises(InputError, match="activations: no integer arithmetic is known for gelu"):
        Target("odd", activations=frozenset({"gelu"}))


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_keeps_the_network_near_and_is_described(
    small: nn.Module, images: Images, name: str
) -> None:
    q = quantize(small, images(16), target=name)
    x = images(32, 5)
    with torch.no_grad():
        difference = (q(x) - small(x)).square().sum() / small(x).square().sum()
    assert difference < 1e-2
    assert TARGETS.get(name).summary.endswith(".")


def test_tensorrt_gets_zero_points_of_zero_and_float_biases(
    tensorrt: tuple[QuantizedModel, Path],
) -> None:
    graph = onnx.load(tensorrt[1]).graph
    tensors = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        for name in node.input[2:]:
            assert tensors[name].dtype == np.int8
            assert not tensors[name].any()
    weights = [n for n in nodes if n.input[0] in tensors]
    assert {tensors[n.input[0]].dtype for n in weights} == {np.dtype(np.int8)}
    assert {a.i for n in weights for a in n.attribute if a.name == "axis"} == {0}
    makers = {n.output[0]: n for n in graph.node}
    for layer in graph.node:
        if layer.op_type in ("Conv", "Gemm"):
            assert all(makers[name].op_type == "DequantizeLinear" for name in layer.input[:2])
            assert tensors[layer.input[2]].dtype == np.float32


def test_tensorrt_sums_read_integers_on_one_branch(
    tensorrt: tuple[QuantizedModel, Path], images: Images
) -> None:
    q, path = tensorrt
    graph = onnx.load(path).graph
    makers = {n.output[0]: n.op_type for n in graph.node}
    (add,) = [n for n in graph.node if n.op_type == "Add"]
    assert sorted(makers[name] for name in add.input) == ["Conv", "DequantizeLinear"]
    assert parity(q, path, [images(16, 3)]).sqnr_db >= 30


@pytest.mark.parametrize("name", ["litert", "xnnpack"])
def test_concatenation_and_pooling_share_one_scale(
    small: nn.Module, images: Images, name: str
) -> None:
    calls = quantize(small, images(16), target=name).plan.calls
    shared = calls[":cat#0"].outputs[0]
    assert {calls[":relu#0"].outputs[0], calls["relu:relu#1"].outputs[0]} == {shared}
    assert calls[":adaptive_avg_pool2d#0"].outputs[0] == shared


def test_the_file_has_the_shared_scale_and_signed_integers(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    q = quantize(small, images(16), target="litert")
    graph = written(q, tmp_path / "shared.onnx", images(1))
    readers = {n.input[0]: n for n in graph.node if n.op_type == "QuantizeLinear"}
    makers = {n.output[0]: n for n in graph.node}
    (concat,) = [n for n in graph.node if n.op_type == "Concat"]
    scales = {makers[name].input[1] for name in concat.input}
    assert scales == {readers[concat.output[0]].input[1]}
    assert all(i.data_type != TensorProto.UINT8 for i in graph.initializer)


def test_a_shared_scale_covers_the_ranges_of_all(small: nn.Module, images: Images) -> None:
    together = quantize(small, images(16), target="litert").quantizers["relu_relu1"]
    apart = quantize(small, images(16), target=replace(TARGETS.get("litert"), shared=frozenset()))
    highs = [apart.quantizers[name].high for name in ("relu_relu1", "relu")]
    assert together.high == max(highs)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return torch.softmax(scores, -1) @ self.v(x)


def test_products_of_two_activations_where_the_target_has_them(tmp_path: Path) -> None:
    x = torch.randn(4, 6, 8)
    q = quantize(Attention(), x, target="generic")
    reads = {d.address: len(d.reads) for d in q.plan.decisions if d.integer}
    assert reads[":matmul#0"] == reads[":matmul#1"] == 2
    export(q, tmp_path / "attention.onnx", x)
    if resolve_target("onnxruntime").sums == "int32":
        assert parity(q, tmp_path / "attention.onnx", [x]).sqnr_db >= 30
    kept = quantize(Attention(), x)
    assert {d.reason for d in kept.plan.decisions if ":matmul" in d.address} == {
        "onnxruntime has no integer matmul"
    }


def test_a_target_says_which_operator_set_it_needs(tmp_path: Path) -> None:
    target, x = replace(TARGETS.get("generic"), name="new", opset=22), torch.randn(2, 4)
    q = quantize(nn.Linear(4, 4), x, target=target)
    with pytest.raises(ExportError, match=r"opset: .* need operator set 22, not 21"):
        export(q, tmp_path / "old.onnx", x)


def test_the_curve_of_a_fused_activation_comes_before_the_rounding(images: Images) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))
    q = quantize(model, images(8), target="openvino")
    assert q.plan.calls["1:silu#0"].outputs
    assert not q.plan.calls["0:conv2d#0"].outputs
    assert q.plan.decisions[0].writes is None
    x = images(8, 3)
    with torch.no_grad():
        assert (q(x) - model(x)).square().sum() < 1e-2 * model(x).square().sum()


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_integer_for_tensorrt(images: Images, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2, groups=groups))
    q = quantize(model, images(8), target="tensorrt")
    assert [d.integer for d in q.plan.decisions] == [True, True]
    assert q.quantizers["1_weight"].scale.shape == (4 // groups,)
    with torch.no_grad():
        difference = (q(images(8, 2)) - model(images(8, 2))).square().sum()
    assert difference < 1e-3 * model(images(8, 2)).square().sum()


def test_transposed_convolutions_keep_integer_weights_elsewhere(
    images: Images, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2))
    q = quantize(model, images(8))
    graph = written(q, tmp_path / "up.onnx", images(1))
    types = {item.name: item.data_type for item in graph.initializer}
    assert types["1.weight"] == TensorProto.INT8
    assert parity(q, tmp_path / "up.onnx", [images(4, 2)]).sqnr_db >= 60
