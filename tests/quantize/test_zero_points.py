"""Weights of few bits whose levels lie where the weights are."""

from __future__ import annotations

import copy
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

import slimkit as sk
from slimkit.quantize import QuantizedModel, ptq, qat
from slimkit.quantize.methods.adaround import AdaRound
from slimkit.quantize.methods.reconstruction import Reconstruct
from slimkit.quantize.quantizers.fixed import WeightQuantizer
from slimkit.quantize.targets import TARGETS
from slimkit.runtime import export, open_session
from slimkit.runtime.fusion import fusion_report
from slimkit.runtime.layer_parity import parity_per_layer
from slimkit.runtime.output_parity import parity

Images = Callable[..., Tensor]
WAYS: dict[str, Any] = {
    "nearest": [],
    "gptq": ["gptq"],
    "adaround": [AdaRound(iterations=20)],
    "reconstruct": [Reconstruct(iterations=10)],
}


def one_sided(model: nn.Module) -> nn.Module:
    """Filters that are hardly ever negative, as blurs are."""
    with torch.no_grad():
        model.get_parameter("depthwise.weight").abs_()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_between_integers_the_kernels_see_int8_and_agree_to_the_bit(
    small: nn.Module, images: Images, tmp_path: Path, way: str
) -> None:
    model, file, x = one_sided(small), tmp_path / "four.onnx", images(16, 3)
    q = ptq(model, x[:1], calibration=[images(16)], weight_bits=4, methods=WAYS[way])
    weights = [m for m in q.quantizers.values() if isinstance(m, WeightQuantizer)]
    assert all(m.zero_point.any() for m in weights)
    assert all(m.fixed == bool(WAYS[way]) for m in weights)
    export(q, file, x[:1])
    fusion = fusion_report(file)
    assert fusion.integer_convs == fusion.convs == 4
    assert fusion.float_nodes == ()
    (out,) = open_session(file).run({"input": x.numpy()})
    with torch.no_grad():
        assert torch.equal(q(x), torch.from_numpy(out))
    layers = parity_per_layer(file, [x])
    assert layers.problems() == []
    assert [layer.name for layer in layers.layers] == ["conv1", "depthwise", "pointwise", "branch"]
    stored = {item.name: item for item in onnx.load(file).graph.initializer}
    assert stored["depthwise.weight"].data_type == TensorProto.INT4
    levels = numpy_helper.to_array(stored["depthwise.weight"]).astype(np.int8)
    assert {levels.min(), levels.max()} == {-8, 7}  # all sixteen are used


def test_openvino_computes_with_them(small: nn.Module, images: Images, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    q = ptq(
        one_sided(small),
        images(1),
        calibration=[images(8)],
        weight_bits=4,
        target="openvino",
        methods=[],
    )
    export(q, tmp_path / "four.onnx", images(1))
    assert parity(q, tmp_path / "four.onnx", [images(16, 2)], backend="openvino").sqnr_db >= 25


def test_the_levels_are_twice_as_dense_for_one_sided_weights(
    small: nn.Module, images: Images
) -> None:
    noise = {}
    target = TARGETS.get("onnxruntime")
    for label, chosen in (("with", target), ("without", replace(target, zero_points=frozenset()))):
        q = ptq(
            copy.deepcopy(one_sided(small)),
            images(1),
            calibration=[images(8)],
            weight_bits=4,
            target=chosen,
            methods=[],
        )
        weight = q.model.get_parameter("depthwise.weight")
        noise[label] = float((q.quantizers["depthwise_weight"](weight) - weight).square().mean())
    assert 3.0 < noise["without"] / noise["with"] < 6.0  # a step half as wide: four times


@pytest.mark.parametrize("scales", ["observed", "lsq"])
def test_they_train_are_saved_and_zeros_stay_zero(
    small: nn.Module, images: Images, tmp_path: Path, scales: str
) -> None:
    model = one_sided(small)
    with torch.no_grad():
        model.get_parameter("branch.weight")[::2] = 0.0
    q = qat(model, images(1), calibration=[images(16)], weight_bits=4, scales=scales)
    mask = q.model.get_parameter("branch.weight") != 0
    optimizer = torch.optim.SGD(q.parameters(), lr=0.01)
    for seed in range(4):
        q(images(8, seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            q.model.get_parameter("branch.weight").mul_(mask)
    q.eval()
    rounded = q.quantizers["branch_weight"](q.model.get_parameter("branch.weight"))
    assert rounded[::2].count_nonzero() == 0
    assert rounded[1::2].count_nonzero() > 0
    export(q, tmp_path / "four.onnx", images(1))
    assert parity(q, tmp_path / "four.onnx", [images(16, 2)]).sqnr_db >= 30
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=small).eval()
    assert isinstance(again, QuantizedModel)
    point = again.quantizers["depthwise_weight"].zero_point
    assert torch.equal(point, q.quantizers["depthwise_weight"].zero_point)
    with torch.no_grad():
        assert torch.equal(again(images(4)), q(images(4)))


def test_only_the_weights_of_few_bits_have_them(small: nn.Module, images: Images) -> None:
    q = ptq(small, images(1), calibration=[images(8)], weight_bits={"fc": 3, "branch": 5})
    forms = {name: str(m.form) for name, m in q.quantizers.items() if "weight" in name}
    assert forms["fc_weight"] == "asymmetric int3"
    assert forms["branch_weight"] == "symmetric int5"
    assert forms["conv1_weight"] == "symmetric int8"
