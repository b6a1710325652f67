"""ResNets for small images (He et al. 2016, "Deep Residual Learning", section 4.2).

A 3×3 stem of 16 channels, three stages of ``n`` basic blocks with 16, 32 and 64 channels at
32, 16 and 8 pixels, global average pooling and one linear layer: ``6n + 2`` layers. Where the
shape changes, the shortcut is a 1×1 convolution with batch norm (the paper's option B).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.models.initialisation import initialise
from slimkit.models.widths import scaled_channels

__all__ = ["BasicBlock", "CifarResNet", "resnet20", "resnet56"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H/stride, W/stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet with ``6 * blocks + 2`` layers for images of about 32×32 pixels.

    Args:
        blocks: basic blocks per stage (3 → ResNet-20, 9 → ResNet-56).
        num_classes: outputs of the last linear layer.
        in_channels: channels of the image.
        width: multiplier of 16, 32 and 64 channels, rounded to multiples of 8.

    Raises:
        ModelError: the width is not positive.
    """

    def __init__(
        self, blocks: int, num_classes: int = 10, in_channels: int = 3, width: float = 1.0
    ) -> None:
        super().__init__()
        small, middle, large = (scaled_channels(base, width) for base in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, small, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(small)
        self.layer1 = _stage(small, small, blocks, stride=1)
        self.layer2 = _stage(small, middle, blocks, stride=2)
        self.layer3 = _stage(middle, large, blocks, stride=2)
        self.fc = nn.Linear(large, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) → logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return cast("Tensor", self.fc(x))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(1, blocks)))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """ResNet-20: 0.27 M parameters with ten classes."""
    return CifarResNet(3, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """ResNet-56: 0.86 M parameters with ten classes."""
    return CifarResNet(9, num_classes, in_channels, width)
