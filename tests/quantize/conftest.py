"""A small residual network with every pattern that must become integer, and its data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slimkit.quantize import QuantizedModel, ptq
from slimkit.runtime import export


class Small(nn.Module):
    """Convolutions with batch norm, ReLU and ReLU6, depthwise, a residual sum, cat, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.relu6 = nn.ReLU6(inplace=True)
        self.pointwise = nn.Conv2d(16, 16, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 8, 1)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        y = self.bn3(self.pointwise(self.relu6(self.bn2(self.depthwise(x)))))
        y += x
        y = self.relu(y)
        y = torch.cat([y, torch.relu(self.branch(y))], 1)
        y = torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1)
        return self.fc(self.dropout(y))


def images(count: int = 8, seed: int = 0) -> Tensor:
    """Smooth random images (N, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear", align_corners=False)


def trained_like(model: nn.Module) -> nn.Module:
    """Batch norms with the statistics of the data."""
    model.train()
    with torch.no_grad():
        for seed in range(20):
            model(images(32, seed))
    return model.eval()


@pytest.fixture(scope="session", name="images")
def images_fixture() -> Callable[..., Tensor]:
    return images


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return trained_like(Small())


@pytest.fixture
def poisoned() -> nn.Module:
    """``small`` with one huge weight, so that one scale for the whole tensor rounds away the rest.

    It meets an input channel that is all but dead, so the float network hardly changes.
    """
    torch.manual_seed(0)
    model = trained_like(Small())
    with torch.no_grad():
        model.bn2.weight[0] = model.bn2.bias[0] = 1e-4
        model.pointwise.weight[:, 0] = 0
        model.pointwise.weight[0, 0] = 60.0
    return model


@pytest.fixture(scope="session")
def small_quantized() -> QuantizedModel:
    torch.manual_seed(0)
    model = trained_like(Small())
    return ptq(model, images(1), calibration=[images(16, seed) for seed in range(4)])


@pytest.fixture(scope="session")
def small_path(small_quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "int8.onnx"
    export(small_quantized, path, images(2))
    return path
