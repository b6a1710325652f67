"""CSP-PAN, PicoDet's neck: a path aggregation network whose nodes are cross-stage partial layers.

Yu et al. 2021, section 3.2: every level has the same width, and a fourth level at stride 64 is
made from both ends of the neck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimkit.models.picodet.blocks import ConvNorm, DepthwiseSeparable

__all__ = ["CSPPAN"]


class CSPLayer(nn.Module):
    """Half of the width passes through a 1×1 and a depthwise separable 5×5, half goes around it.

    Cross-stage partial network (Wang et al. 2020) with one bottleneck, without shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 5) -> None:
        super().__init__()
        half = out_channels // 2
        self.short = ConvNorm(in_channels, half)
        self.main = ConvNorm(in_channels, half)
        self.block = nn.Sequential(ConvNorm(half, half), DepthwiseSeparable(half, half, kernel))
        self.fuse = ConvNorm(2 * half, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H, W)."""
        short = self.short(x)
        return cast("Tensor", self.fuse(torch.cat([self.block(self.main(x)), short], dim=1)))


class CSPPAN(nn.Module):
    """Top-down, then bottom-up, then one level more.

    Args:
        in_channels: of the features at strides 8, 16 and 32.
        channels: of every output.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(ConvNorm(width, channels) for width in in_channels)
        steps = range(len(in_channels) - 1)
        self.top_down = nn.ModuleList(CSPLayer(2 * channels, channels) for _ in steps)
        self.down = nn.ModuleList(DepthwiseSeparable(channels, channels, 5, 2) for _ in steps)
        self.bottom_up = nn.ModuleList(CSPLayer(2 * channels, channels) for _ in steps)
        self.extra_from_input = DepthwiseSeparable(channels, channels, 5, 2)
        self.extra_from_output = DepthwiseSeparable(channels, channels, 5, 2)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features at strides 8, 16, 32 → ``channels`` each at strides 8, 16, 32, 64."""
        reduced = [conv(x) for conv, x in zip(self.reduce, features, strict=True)]
        merged = [reduced[-1]]
        for layer, lower in zip(self.top_down, reduced[-2::-1], strict=True):
            upper = F.interpolate(merged[0], size=lower.shape[-2:], mode="nearest")
            merged.insert(0, layer(torch.cat([upper, lower], dim=1)))
        outputs = [merged[0]]
        for down, layer, upper in zip(self.down, self.bottom_up, merged[1:], strict=True):
            outputs.append(layer(torch.cat([down(outputs[-1]), upper], dim=1)))
        extra = self.extra_from_input(reduced[-1]) + self.extra_from_output(outputs[-1])
        return [*outputs, extra]
