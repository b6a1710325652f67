from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slimkit.train.depthwise import dense_depthwise

CPU = torch.device("cpu")


@pytest.mark.parametrize(("stride", "kernel", "dilation"), [(2, 3, 1), ((2, 1), 5, 1), (3, 3, 2)])
@pytest.mark.parametrize("size", [11, 12])
def test_a_dense_depthwise_convolution_computes_what_the_strided_one_does(
    stride: int | tuple[int, int], kernel: int, dilation: int, size: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, stride, 2, dilation, groups=6)
    strided = copy.deepcopy(conv)
    x = torch.randn(2, 6, size, size)
    with torch.autocast("cpu", torch.bfloat16):
        expected = strided(x)
        with dense_depthwise(conv, CPU):
            found = conv(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert conv.weight.grad is not None
    torch.testing.assert_close(conv.weight.grad, strided.weight.grad, rtol=3e-2, atol=3e-2)


def test_only_strided_depthwise_layers_change_and_only_inside() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, 2, 1, groups=4),
        nn.Conv2d(4, 4, 3, 1, 1, groups=4),
        nn.Conv2d(4, 8, 3, 2),
    )
    with dense_depthwise(model, CPU):
        assert ["forward" in vars(layer) for layer in model] == [True, False, False]
        x = torch.randn(1, 4, 8, 8)
        exact = copy.deepcopy(model)(x)  # a copy made inside runs on its own weights
        assert torch.equal(model(x), exact)  # float32 is left alone
    assert not any("forward" in vars(layer) for layer in model)
    with dense_depthwise(model, torch.device("meta")):
        assert not any("forward" in vars(layer) for layer in model)
