"""ESNet, PicoDet's backbone: ShuffleNetV2 with squeeze-and-excitation, mixed by ghost features.

Yu et al. 2021, "PP-PicoDet: A Better Real-Time Object Detector on Mobile Devices", section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from slimkit.errors import ModelError
from slimkit.models.picodet.blocks import ConvNorm, SqueezeExcitation, divisible

__all__ = ["ESNet"]

_REPEATS = (3, 7, 3)
"""Blocks per stage; the first of each halves the image."""


class EnhancedShuffle(nn.Module):
    """Half of the channels pass, half go through ghost features and a gate; then a shuffle.

    Args:
        channels: in and out.
        middle: channels between, half of them made by a depthwise convolution of the others
            (ghost features, Han et al. 2020).
    """

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.expand = ConvNorm(channels // 2, middle // 2)
        self.ghost = ConvNorm(middle // 2, middle // 2, 3, groups=middle // 2, act=False)
        self.se = SqueezeExcitation(middle)
        self.project = ConvNorm(middle, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        kept, changed = x.chunk(2, dim=1)
        features = self.expand(changed)
        features = self.se(torch.cat([features, self.ghost(features)], dim=1))
        return _shuffled(torch.cat([kept, self.project(features)], dim=1))


class EnhancedShuffleDown(nn.Module):
    """The block at stride 2: two branches of all channels, then a depthwise separable mix.

    Args:
        in_channels, out_channels: of the block.
        middle: twice the channels of the second branch.
    """

    def __init__(self, in_channels: int, out_channels: int, middle: int) -> None:
        super().__init__()
        half, inner = out_channels // 2, middle // 2
        self.shortcut = nn.Sequential(
            ConvNorm(in_channels, in_channels, 3, 2, groups=in_channels, act=False),
            ConvNorm(in_channels, half),
        )
        self.branch = nn.Sequential(
            ConvNorm(in_channels, inner),
            ConvNorm(inner, inner, 3, 2, groups=inner, act=False),
            SqueezeExcitation(inner),
            ConvNorm(inner, half),
        )
        self.mix = nn.Sequential(
            ConvNorm(out_channels, out_channels, 3, groups=out_channels),
            ConvNorm(out_channels, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H/2, W/2)."""
        return cast("Tensor", self.mix(torch.cat([self.shortcut(x), self.branch(x)], dim=1)))


class ESNet(nn.Module):
    """A strided stem and three stages; what each stage ends with goes to the neck.

    Args:
        scale: multiplier of the stages' 128, 256 and 512 channels, to multiples of 16.
        ratios: inner width of each of the 13 blocks, relative to its stage.
        in_channels: of the image.

    Attributes:
        channels: of the three outputs, at strides 8, 16 and 32.

    Raises:
        ModelError: the scale is not positive, or there are not 13 ratios.
    """

    def __init__(self, scale: float, ratios: Sequence[float], in_channels: int = 3) -> None:
        super().__init__()
        if not scale > 0:
            raise ModelError(f"scale must be positive, got {scale}", where="scale")
        if len(ratios) != sum(_REPEATS):
            raise ModelError(f"expected 13 ratios, got {len(ratios)}", where="ratios")
        self.stem = ConvNorm(in_channels, 24, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.channels = tuple(divisible(base * scale, 16) for base in (128, 256, 512))
        self.stages = nn.ModuleList()
        width, rest = 24, iter(ratios)
        for out_channels, repeats in zip(self.channels, _REPEATS, strict=True):
            blocks: list[nn.Module] = []
            for number in range(repeats):
                middle = divisible(int(out_channels * next(rest)), 8)
                blocks.append(
                    EnhancedShuffle(out_channels, middle)
                    if number
                    else EnhancedShuffleDown(width, out_channels, middle)
                )
            self.stages.append(nn.Sequential(*blocks))
            width = out_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) → features at strides 8, 16 and 32."""
        x = self.pool(self.stem(x))
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return taps


def _shuffled(x: Tensor) -> Tensor:
    """Channel shuffle of two groups (Zhang et al. 2018)."""
    return nn.functional.channel_shuffle(x, 2)
