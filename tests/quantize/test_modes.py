"""Scales from each batch, and integers for weights only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

import slimkit as sk
from slimkit.quantize import QuantizedModel, ptq, qat
from slimkit.quantize.quantizers.dynamic import DynamicQuantizer
from slimkit.quantize.targets import TARGETS, NumberFormat
from slimkit.runtime import export, fusion_report, open_session
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]


class Tokens(nn.Module):
    """Embeddings, linear layers on three dimensions, two readers of one value, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64)
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.out((torch.tanh(self.left(x)) + self.right(x)).mean(1))


def tokens(count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (count, 7), generator=generator)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().eval()


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_dynamic_linear_layers_run_as_integers_and_agree_to_the_bit(
    network: nn.Module, tmp_path: Path
) -> None:
    q = ptq(network, tokens(), mode="dynamic")
    export(q, tmp_path / "dynamic.onnx", tokens())
    fusion = fusion_report(tmp_path / "dynamic.onnx")
    assert fusion.integer_linears == fusion.linears == 3
    assert operators(tmp_path / "dynamic.onnx")["DynamicQuantizeLinear"] == 2  # one per value
    result = parity(q, tmp_path / "dynamic.onnx", [tokens(1, 5), tokens(8, 6)])
    assert result.sqnr_db >= 60  # tanh and mean stay in float
    plain = ptq(nn.Linear(64, 16), torch.randn(3, 64), mode="dynamic")
    export(plain, tmp_path / "linear.onnx", torch.randn(3, 64))
    x = torch.randn(5, 64)
    (out,) = open_session(tmp_path / "linear.onnx").run({"input": x.numpy()})
    with torch.no_grad():
        assert torch.equal(plain(x), torch.from_numpy(out))


def test_the_dynamic_grid_is_that_of_the_onnx_operator() -> None:
    q = DynamicQuantizer(NumberFormat(8))
    x = torch.tensor([-1.0, 0.0, 0.3, 2.0])
    y = q(x)
    scale = np.float32(3.0) / np.float32(255)
    point = np.rint(np.float32(1.0) / scale)
    assert q.scale.item() == scale
    assert q.zero_point.item() == point
    levels = np.rint(x.numpy() / scale) + point
    np.testing.assert_array_equal(y.numpy(), (levels - point).astype(np.float32) * scale)
    assert torch.equal(q(torch.zeros(3)), torch.zeros(3))


def test_dynamic_convolutions_where_a_target_wants_them(images: Images, tmp_path: Path) -> None:
    from dataclasses import replace

    target = replace(TARGETS.get("onnxruntime"), dynamic=frozenset({"conv2d"}))
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
    q = ptq(model, images(1), mode="dynamic", target=target)
    export(q, tmp_path / "conv.onnx", images(1))
    fusion = fusion_report(tmp_path / "conv.onnx")
    assert fusion.integer_convs == fusion.convs == 2
    assert parity(q, tmp_path / "conv.onnx", [images(4, 3)]).sqnr_db >= 60


def test_convolutions_keep_integer_weights_and_run_at_the_speed_of_floats(
    small: nn.Module, images: Images, tmp_path: Path
) -> None:
    q = ptq(small, images(1), mode="weights")
    assert q.bit_widths()["model.conv1"] == (8, 32)
    export(q, tmp_path / "weights.onnx", images(1))
    types = {i.name: i.data_type for i in onnx.load(tmp_path / "weights.onnx").graph.initializer}
    assert types["conv1.weight"] == types["fc.weight"] == TensorProto.INT8
    running = fusion_report(tmp_path / "weights.onnx").operators
    assert running["Conv"] == 4
    assert "Cast" not in running  # done when the file was loaded
    assert "DequantizeLinear" not in running
    assert parity(q, tmp_path / "weights.onnx", [images(16, 3)]).sqnr_db >= 30


def test_rows_of_embeddings_are_int8(network: nn.Module, tmp_path: Path) -> None:
    q = ptq(network, tokens(), calibration=[tokens(16)])
    assert q.quantizers["words_weight"].scale.shape == (50,)
    whole = export(network, tmp_path / "float.onnx", tokens()).bytes
    small = export(q, tmp_path / "static.onnx", tokens()).bytes
    assert small < 0.25 * whole + 3000
    graph = onnx.load(tmp_path / "static.onnx").graph
    types = {i.name: i.data_type for i in graph.initializer}
    assert types["words.weight"] == TensorProto.INT8
    assert fusion_report(tmp_path / "static.onnx").integer_linears == 3
    assert parity(q, tmp_path / "static.onnx", [tokens(8, 5)]).sqnr_db >= 40


def test_saved_and_loaded_networks_are_equal(network: nn.Module, tmp_path: Path) -> None:
    for number, options in enumerate(
        [{"mode": "dynamic"}, {"mode": "weights", "granularity": "group", "weight_bits": 4}]
    ):
        q = ptq(network, tokens(), **options)
        sk.save(q, tmp_path / str(number))
        again = sk.load(tmp_path / str(number), model=Tokens()).eval()
        assert isinstance(again, QuantizedModel)
        assert again.plan == q.plan
        with torch.no_grad():
            assert torch.equal(again(tokens(3, 8)), q(tokens(3, 8)))


def test_a_dynamic_network_trains(network: nn.Module) -> None:
    q = qat(network, tokens(), mode="dynamic")
    before = q.model.left.weight.clone()
    q(tokens()).square().sum().backward()
    torch.optim.SGD(q.parameters(), lr=0.1).step()
    assert not torch.equal(before, q.model.left.weight)


def test_explain_says_how_scales_are_found(network: nn.Module) -> None:
    text = ptq(network, tokens(), mode="weights").plan.explain()
    assert "integer weights only" in text
    assert "its weight is kept as integers" in text
    assert "scales of each batch" in ptq(network, tokens(), mode="dynamic").plan.explain()


def test_a_table_that_is_also_the_last_layer_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(40, 16)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids))

    q = ptq(Tied(), tokens() % 40, mode="dynamic")
    export(q, tmp_path / "tied.onnx", tokens() % 40)
    assert parity(q, tmp_path / "tied.onnx", [tokens(4, 3) % 40]).sqnr_db >= 60
