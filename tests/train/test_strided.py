from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkit.train import TrainSettings, fit
from slimkit.train.strided import at_stride_one

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("stride", "kernel", "dilation"), [(2, 3, 1), ((2, 1), 5, 1), (3, 3, 2), (1, 5, 1), (1, 7, 1)]
)
@pytest.mark.parametrize("size", [11, 12])
def test_a_depthwise_convolution_by_another_kernel_computes_the_same(
    stride: int | tuple[int, int], kernel: int, dilation: int, size: int
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, stride, 2, dilation, groups=6)
    plain = copy.deepcopy(conv)
    x = torch.randn(2, 6, size, size)
    expected = plain(x)  # in float32
    with torch.autocast("cpu", torch.bfloat16), at_stride_one(conv, CPU):
        found = conv(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    assert conv.weight.grad is not None
    assert plain.weight.grad is not None
    error = (conv.weight.grad - plain.weight.grad).norm() / plain.weight.grad.norm()
    assert error < 0.01


def test_only_bf16_training_is_different() -> None:
    conv = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    x = torch.randn(1, 4, 9, 9)
    expected = conv(x)
    with at_stride_one(conv, CPU):
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inside = conv(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(inside, conv(x), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups"), [(5, 1), (15, 3)])
def test_a_strided_convolution_of_few_channels_gets_every_other_pixel(
    channels: int, groups: int, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, 1, (2, 3), groups=groups)
    x = torch.randn(2, channels, 9, 10)
    reference, seen = copy.deepcopy(conv), x.clone().requires_grad_()
    expected = reference(seen)  # in the usual layout, where the kernel is right
    expected.square().sum().backward()
    conv, x = conv.to(memory_format=layout), x.contiguous(memory_format=layout).requires_grad_()
    with at_stride_one(conv, CPU):
        found = conv(x)
        found.square().sum().backward()
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected)
    for mine, theirs in ((x, seen), (conv.weight, reference.weight), (conv.bias, reference.bias)):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_network_whose_downsampling_has_five_channels_trains_alike_in_both_layouts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 32, 1, 2), nn.Flatten(), nn.Linear(32 * 256, 2)
    )
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(0, 2, (16,))) for _ in range(3)]
    trained = []
    for layout in (False, True):
        settings = TrainSettings(epochs=1, lr=0.001, precision="fp32", channels_last=layout)
        network = copy.deepcopy(model)
        fit(network, batches, loss_fn=F.cross_entropy, settings=settings, progress=False)
        trained.append(network.state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-5)


def test_only_such_layers_change_and_only_inside() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, 2, 1, groups=4),
        nn.Conv2d(4, 4, 3, 1, 1, groups=4),
        nn.Conv2d(4, 8, 3, 2),
        nn.Conv2d(8, 8, 1, 2),
        nn.Conv2d(8, 16, 1, 1),
        nn.Conv2d(16, 8, 1, 2),
    )
    with at_stride_one(model, CPU):
        assert [i for i, layer in enumerate(model) if "forward" in vars(layer)] == [0, 3]
        x = torch.randn(1, 4, 8, 8)
        exact = copy.deepcopy(model)(x)  # a copy made inside runs on its own weights
        assert torch.equal(model(x), exact)  # float32 is left alone
    assert not any("forward" in vars(layer) for layer in model)
    with at_stride_one(model, torch.device("meta")):
        assert not any("forward" in vars(layer) for layer in model)
