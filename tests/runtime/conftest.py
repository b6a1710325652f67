"""Small networks and hand-written files for the runtime tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slimkit.runtime.exporting import export


class Residual(nn.Module):
    """Convolutions with batch norm, a residual sum, adaptive pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x)
        return self.fc(torch.flatten(self.pool(x), 1))


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as after training, so that folding them wrongly shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


@pytest.fixture(scope="session")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(Residual()).eval()


@pytest.fixture(scope="session")
def residual_path(residual: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("residual") / "model.onnx"
    export(residual, path, torch.randn(1, 3, 16, 16))
    return path


def quantized_chain() -> onnx.ModelProto:
    """input → Q → conv (grouped, strided, asymmetric padding) → Relu → Q → gemm → Q → DQ."""
    rng = np.random.default_rng(0)
    constants: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    def pair(name: str, scale: float, zero: int) -> list[str]:
        return [
            constant(f"{name}_scale", np.float32(scale)),
            constant(f"{name}_zero", np.uint8(zero)),
        ]

    x, y, z = pair("x", 0.02, 128), pair("y", 0.05, 0), pair("z", 0.1, 117)
    weight = constant("w", rng.integers(-63, 64, (6, 2, 3, 3), np.int8))  # exact without VNNI
    w = [
        constant("w_scale", rng.uniform(0.001, 0.003, 6).astype(np.float32)),
        constant("w_zero", np.zeros(6, np.int8)),
    ]
    bias_scale = numpy_helper.to_array(constants[-2]) * np.float32(0.02)
    bias = constant("b", rng.integers(-3000, 3000, 6, np.int32))
    b = [
        constant("b_scale", bias_scale.astype(np.float32)),
        constant("b_zero", np.zeros(6, np.int32)),
    ]
    matrix = constant("m", rng.integers(-63, 64, (5, 6 * 16), np.int8))
    m = [
        constant("m_scale", rng.uniform(0.001, 0.003, 5).astype(np.float32)),
        constant("m_zero", np.zeros(5, np.int8)),
    ]
    shape = constant("shape", np.array([-1, 6 * 16], np.int64))
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["input", *x], ["xq"]),
        node("DequantizeLinear", ["xq", *x], ["xf"]),
        node("DequantizeLinear", [weight, *w], ["wf"], axis=0),
        node("DequantizeLinear", [bias, *b], ["bf"], axis=0),
        node(
            "Conv",
            ["xf", "wf", "bf"],
            ["c"],
            name="features.conv",
            group=2,
            strides=[2, 2],
            pads=[1, 0, 1, 2],
        ),
        node("Relu", ["c"], ["r"], name="features.relu"),
        node("QuantizeLinear", ["r", *y], ["yq"]),
        node("DequantizeLinear", ["yq", *y], ["yf"]),
        node("Reshape", ["yf", shape], ["flat"]),
        node("QuantizeLinear", ["flat", *y], ["fq"]),
        node("DequantizeLinear", ["fq", *y], ["ff"]),
        node("DequantizeLinear", [matrix, *m], ["mf"], axis=0),
        node("Gemm", ["ff", "mf"], ["g"], name="head", transB=1),
        node("QuantizeLinear", ["g", *z], ["zq"]),
        node("DequantizeLinear", ["zq", *z], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4, 8, 7])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def quantized_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "model.onnx"
    path.write_bytes(quantized_chain().SerializeToString())
    return path
