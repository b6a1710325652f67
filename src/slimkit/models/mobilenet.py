"""MobileNetV1 (Howard et al. 2017, "MobileNets", table 1) with a stem for small images too."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.errors import ModelError, nearest
from slimkit.models.initialisation import initialise
from slimkit.models.widths import scaled_channels

__all__ = ["DepthwiseSeparable", "MobileNetV1", "mobilenet_v1"]

_CHANNELS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
_STRIDES = {  # of the stem, of the thirteen blocks
    "imagenet": (2, (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)),
    "cifar": (1, (1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 1)),
}


class DepthwiseSeparable(nn.Module):
    """A 3×3 convolution per channel, then a 1×1 convolution across channels, each with BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False
        )
        self.depthwise_bn = nn.BatchNorm2d(in_channels)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pointwise_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H/stride, W/stride)."""
        x = F.relu(self.depthwise_bn(self.depthwise(x)), inplace=True)
        return F.relu(self.pointwise_bn(self.pointwise(x)), inplace=True)


class MobileNetV1(nn.Module):
    """A strided stem, thirteen depthwise separable blocks, average pooling, one linear layer.

    Args:
        num_classes: outputs of the classifier.
        width: multiplier of every channel count, which is then rounded to a multiple of 8.
        in_channels: channels of the image.
        stem: ``"imagenet"`` halves the image in the stem (224 → 7 pixels before pooling);
            ``"cifar"`` does not, nor in the sixth block (32 → 4 pixels).

    Raises:
        ModelError: the stem is unknown or the width is not positive.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        in_channels: int = 3,
        stem: Literal["cifar", "imagenet"] = "imagenet",
    ) -> None:
        super().__init__()
        if stem not in _STRIDES:
            hint = nearest(stem, _STRIDES)
            raise ModelError(f"unknown stem {stem!r}", where="stem", hint=hint)
        channels = scaled_channels(32, width)
        stem_stride, strides = _STRIDES[stem]
        self.stem = nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        blocks = []
        for base, stride in zip(_CHANNELS, strides, strict=True):
            out_channels = scaled_channels(base, width)
            blocks.append(DepthwiseSeparable(channels, out_channels, stride))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → logits (N, num_classes)."""
        x = F.relu(self.stem_bn(self.stem(x)), inplace=True)
        x = self.blocks(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return cast("Tensor", self.classifier(x))


def mobilenet_v1(
    num_classes: int = 1000,
    width: float = 1.0,
    in_channels: int = 3,
    stem: Literal["cifar", "imagenet"] = "imagenet",
) -> MobileNetV1:
    """MobileNetV1: 4.23 M parameters with 1000 classes at width 1."""
    return MobileNetV1(num_classes, width, in_channels, stem)
