from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from slimkit.errors import InputError
from slimkit.runtime.layer_parity import LayersParity, parity_per_layer
from slimkit.runtime.output_parity import parity


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def images(size: int) -> torch.Tensor:
    return torch.randn(size, 3, 16, 16)


def test_batches_may_be_pairs_with_labels(residual: nn.Module, residual_path: Path) -> None:
    pairs = [(images(2), torch.zeros(2)), [images(3), torch.zeros(3)]]
    assert parity(residual, residual_path, pairs).samples == 5


def test_noise_is_measured_in_decibels(residual: nn.Module, residual_path: Path) -> None:
    louder = copy.deepcopy(residual)
    with torch.no_grad():
        louder.fc.weight *= 1.1
        louder.fc.bias *= 1.1
    result = parity(louder, residual_path, [images(16)])
    assert result.sqnr_db == pytest.approx(20 * math.log10(1.1 / 0.1), abs=0.05)
    assert result.top1_agreement == 1.0
    assert not result.passed("fp32")
    assert result.problems("int8") == [f"SQNR {result.sqnr_db:.1f} dB, wanted 30 dB"]


def test_another_network_is_not_taken_for_the_same(residual_path: Path) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)).train()
    result = parity(other, residual_path, [images(64)])
    assert not result.passed("fp32")
    assert len(result.problems("int8")) == 2
    assert other.training


def test_equal_outputs_are_valid_json(residual: nn.Module, residual_path: Path) -> None:
    data = parity(residual, residual_path, [images(2)]).to_json()
    data["sqnr_db"] = math.inf
    result = parity(residual, residual_path, [images(2)])
    equal = type(result)(**{**vars(result), "sqnr_db": math.inf})
    assert json.loads(json.dumps(equal.to_json(), allow_nan=False))["sqnr_db"] is None
    assert "inf" in str(equal)


def test_no_batches_or_wrong_shapes_are_errors(residual: nn.Module, residual_path: Path) -> None:
    with pytest.raises(InputError, match="batches"):
        parity(residual, residual_path, [])
    with pytest.raises(InputError, match="logits"):
        parity(nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), residual_path, [images(1)])
    with pytest.raises(InputError, match="returns 2"):
        parity(Two(), residual_path, [images(1)])


def test_integer_layers_agree_with_exact_arithmetic(quantized_path: Path) -> None:
    result = parity_per_layer(quantized_path, [torch.randn(4, 4, 8, 7) for _ in range(3)])
    assert [(layer.name, layer.type) for layer in result.layers] == [
        ("features.conv", "Conv"),
        ("head", "Gemm"),
    ]
    assert all(layer.integer for layer in result.layers)
    assert result.layers[0].elements == 3 * 4 * 6 * 4 * 4
    assert result.problems() == []
    assert result.exact > 0.99
    json.dumps(result.to_json(), allow_nan=False)


def test_layer_parity_notices_a_layer_that_computes_something_else(
    quantized_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference reads the weights from the file: give the runtime other ones."""
    from slimkit.runtime import layer_parity

    def falsified(model: onnx.ModelProto, path: Path, threads: int):  # type: ignore[no-untyped-def]
        changed = copy.deepcopy(model)
        for item in changed.graph.initializer:
            if item.name == "m" and path.name.startswith("layer"):
                item.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(item), "m"))
        return original(changed, path, threads)

    original = layer_parity._open
    monkeypatch.setattr(layer_parity, "_open", falsified)
    result = parity_per_layer(quantized_path, [torch.randn(8, 4, 8, 7)])
    assert [layer.name for layer in result.layers if layer.within_one < 0.9] == ["head"]
    assert len(result.problems()) == 1


def test_a_float_file_has_no_integer_layers(residual_path: Path) -> None:
    result = parity_per_layer(residual_path, [images(1)])
    assert result == LayersParity(())
    assert result.within_one == 1.0
    with pytest.raises(InputError):
        parity_per_layer(residual_path, [])


def test_transposed_convolutions_have_a_reference() -> None:
    from slimkit.runtime.reference_nodes import _layer

    x, weight = torch.randn(2, 4, 5, 6).double(), torch.randn(4, 3, 3, 3).double()
    ours = _layer("ConvTranspose", [x, weight, None], {"strides": [2, 2], "pads": [1, 1, 0, 0]})
    full = torch.nn.functional.conv_transpose2d(x, weight, stride=2)
    np.testing.assert_array_equal(ours.numpy(), full[:, :, 1:, 1:].numpy())
