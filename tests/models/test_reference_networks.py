"""The reference networks have the published sizes, names and shapes."""

from __future__ import annotations

import pytest
import torch

from slimkit.errors import ModelError
from slimkit.models import build_model


def parameters(name: str, **kwargs: object) -> int:
    return sum(p.numel() for p in build_model(name, **kwargs).parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "millions"),
    [
        ("slimkit:resnet20", {}, 0.27),
        ("slimkit:resnet56", {}, 0.86),
        ("slimkit:resnet20", {"width": 1.5}, 0.61),
        ("slimkit:mobilenet_v1", {}, 4.23),
        ("slimkit:mobilenet_v1", {"width": 0.5}, 1.33),
        ("slimkit:vgg16_bn", {}, 14.72),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, kwargs: dict[str, object], millions: float
) -> None:
    assert round(parameters(name, **kwargs) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "kwargs", "channels", "classes"),
    [
        ("slimkit:resnet20", {"in_channels": 1, "num_classes": 7}, 1, 7),
        ("slimkit:mobilenet_v1", {"stem": "cifar", "num_classes": 10, "width": 0.25}, 3, 10),
        ("slimkit:vgg16_bn", {"in_channels": 1}, 1, 10),
    ],
)
def test_logits_have_one_entry_per_class(
    name: str, kwargs: dict[str, object], channels: int, classes: int
) -> None:
    model = build_model(name, **kwargs).eval()
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, classes)


def test_resnet_keys_are_those_of_existing_checkpoints() -> None:
    keys = set(build_model("slimkit:resnet20").state_dict())
    expected = {"conv1.weight", "bn1.running_var", "fc.bias", "layer1.2.conv2.weight"}
    assert expected <= keys
    assert {"layer2.0.downsample.0.weight", "layer3.0.downsample.1.bias"} <= keys
    assert not any(key.startswith("layer1.0.downsample") for key in keys)


@pytest.mark.parametrize(
    ("stem", "size", "before_pooling"), [("cifar", 32, 4), ("imagenet", 64, 2)]
)
def test_mobilenet_strides_follow_the_stem(stem: str, size: int, before_pooling: int) -> None:
    model = build_model("slimkit:mobilenet_v1", stem=stem, width=0.25, num_classes=10).eval()
    seen = []
    model.blocks.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-1]))
    model(torch.randn(1, 3, size, size))
    assert seen == [before_pooling]


def test_mobilenet_widths_are_multiples_of_eight() -> None:
    model = build_model("slimkit:mobilenet_v1", width=0.35, num_classes=10)
    widths = {m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert widths
    assert all(width % 8 == 0 for width in widths)


def test_first_activations_neither_vanish_nor_explode() -> None:
    torch.manual_seed(0)
    model = build_model("slimkit:mobilenet_v1", stem="cifar", width=0.5, num_classes=10)
    gradients = torch.autograd.grad(
        model(torch.randn(8, 3, 32, 32)).square().sum(), list(model.parameters())
    )
    assert all(torch.isfinite(g).all() for g in gradients)
    assert gradients[0].abs().max() > 0


def test_unknown_stem_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="imagenet"):
        build_model("slimkit:mobilenet_v1", stem="imagnet")
