"""VGG-16 with batch norm for small images (Simonyan & Zisserman 2014, configuration D).

The three wide linear layers of the original are one 512-d linear head, as is usual at 32×32.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.models.initialisation import initialise

__all__ = ["CifarVGG", "vgg16_bn"]

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class CifarVGG(nn.Module):
    """Thirteen 3×3 convolutions with batch norm in five stages, each ended by 2×2 max pooling.

    Args:
        num_classes: outputs of the last linear layer.
        in_channels: channels of the image.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in _STAGES:
            for out_channels in stage:
                layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(out_channels))
                layers.append(nn.ReLU(inplace=True))
                in_channels = out_channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W), H and W at least 32 → logits (N, num_classes)."""
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return cast("Tensor", self.classifier(torch.flatten(x, 1)))


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> CifarVGG:
    """VGG-16-BN: 14.7 M parameters with ten classes."""
    return CifarVGG(num_classes, in_channels)
