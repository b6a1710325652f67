"""Evaluation of a quantized model against ONNX Runtime's integer kernels: equal, not near."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimkit.quantize import QuantizedModel, ptq
from slimkit.runtime import export, open_session

Images = Callable[..., Tensor]


class Deep(nn.Module):
    """Eight residual sums: one flipped rounding anywhere would reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for index, conv in enumerate(self.convs):
            x = conv(x) + x if index % 2 else torch.relu(conv(x) + x)
        x = x.mean((2, 3))
        return self.fc(torch.relu(self.hidden(x)))


def runtime(path: Path, x: Tensor) -> Tensor:
    (out,) = open_session(path).run({"input": x.numpy()})
    return torch.from_numpy(out)


def test_a_deep_network_is_computed_to_the_bit(images: Images, tmp_path: Path) -> None:
    q = ptq(Deep(), images(1), calibration=[images(16)], granularity="tensor")
    export(q, tmp_path / "deep.onnx", images(1))
    x = images(64, 9)
    with torch.no_grad():
        assert torch.equal(q(x), runtime(tmp_path / "deep.onnx", x))


def test_depthwise_cat_and_inplace_sums_are_computed_to_the_bit(
    small_quantized: QuantizedModel, small_path: Path, images: Images
) -> None:
    x = images(64, 9)
    with torch.no_grad():
        assert torch.equal(small_quantized(x), runtime(small_path, x))


def test_it_differs_from_training_by_a_few_roundings_only(
    small_quantized: QuantizedModel, images: Images
) -> None:
    x = images(32, 9)
    with torch.no_grad():
        exact = small_quantized(x)
    rounded = small_quantized(x)
    assert rounded.requires_grad
    assert (exact - rounded).square().sum() < 1e-3 * exact.square().sum()


def test_autocast_falls_back_to_plain_rounding(
    small_quantized: QuantizedModel, images: Images
) -> None:
    x = images(8, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        short = small_quantized(x)
    with torch.no_grad():
        assert (small_quantized(x) - short.float()).abs().max() < 0.1


class InPlace(nn.Module):
    """Uses the tensor that an in-place sum changed, not what the sum returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.add_(self.second(x))
        return y


def test_an_inplace_sum_changes_its_argument(images: Images) -> None:
    model = InPlace()
    q = ptq(model, images(1), calibration=[images(8)])
    with torch.no_grad():
        assert (q(images(4)) - model(images(4))).abs().max() < 0.1
