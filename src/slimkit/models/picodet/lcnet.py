"""PP-LCNet, a plain backbone of depthwise separable convolutions (Cui et al. 2021, table 1).

"PP-LCNet: A Lightweight CPU Convolutional Neural Network" (https://arxiv.org/abs/2109.15099).
No branches and few layers: the LCNet variant of PicoDet takes it in the place of ESNet.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from slimkit.errors import ModelError
from slimkit.models.picodet.blocks import ConvNorm, SqueezeExcitation, divisible

__all__ = ["LCNet"]

_STEM = 16
_STAGES: tuple[tuple[tuple[int, int, int, bool], ...], ...] = (
    ((3, 32, 1, False),),
    ((3, 64, 2, False), (3, 64, 1, False)),
    ((3, 128, 2, False), (3, 128, 1, False)),
    ((3, 256, 2, False), *((5, 256, 1, False),) * 5),
    ((5, 512, 2, True), (5, 512, 1, True)),
)
"""Blocks of each stage: kernel, channels before scaling, stride, and whether a gate is in it."""


class LCNetBlock(nn.Module):
    """Depthwise convolution, perhaps a channel gate, 1×1 convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, gate: bool
    ) -> None:
        super().__init__()
        self.depthwise = ConvNorm(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.se = SqueezeExcitation(in_channels) if gate else nn.Identity()
        self.pointwise = ConvNorm(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H/stride, W/stride)."""
        return cast("Tensor", self.pointwise(self.se(self.depthwise(x))))


class LCNet(nn.Module):
    """A strided stem and five stages; what the last three end with goes to the neck.

    Args:
        scale: multiplier of all widths, which are multiples of 8.
        in_channels: of the image.

    Attributes:
        channels: of the three outputs, at strides 8, 16 and 32.

    Raises:
        ModelError: the scale is not positive.
    """

    def __init__(self, scale: float, in_channels: int = 3) -> None:
        super().__init__()
        if not scale > 0:
            raise ModelError(f"scale must be positive, got {scale}", where="scale")
        width = divisible(_STEM * scale, 8)
        self.stem = ConvNorm(in_channels, width, 3, 2)
        self.stages = nn.ModuleList()
        ends = []
        for stage in _STAGES:
            blocks: list[nn.Module] = []
            for kernel, base, stride, gate in stage:
                wider = divisible(base * scale, 8)
                blocks.append(LCNetBlock(width, wider, kernel, stride, gate))
                width = wider
            self.stages.append(nn.Sequential(*blocks))
            ends.append(width)
        self.channels = tuple(ends[2:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_channels, H, W) → features at strides 8, 16 and 32."""
        x = self.stem(x)
        ends = []
        for stage in self.stages:
            x = stage(x)
            ends.append(x)
        return ends[2:]
