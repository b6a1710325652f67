"""Building blocks of PicoDet: normalised and depthwise separable convolutions, a channel gate."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

__all__ = ["ConvNorm", "DepthwiseSeparable", "SqueezeExcitation", "divisible"]


class ConvNorm(nn.Module):
    """Convolution, batch norm, hard-swish; the padding keeps the size at stride 1.

    Args:
        in_channels, out_channels: of the convolution.
        kernel: odd size in pixels.
        stride: 1 or 2.
        groups: ``in_channels`` makes it depthwise.
        act: False leaves the activation out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.Hardswish() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) → (N, out, H/stride, W/stride)."""
        return cast("Tensor", self.act(self.norm(self.conv(x))))


class DepthwiseSeparable(nn.Sequential):
    """A depthwise convolution, then a 1×1 one, each with batch norm and hard-swish."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 5, stride: int = 1
    ) -> None:
        super().__init__(
            ConvNorm(in_channels, in_channels, kernel, stride, groups=in_channels),
            ConvNorm(in_channels, out_channels),
        )


class SqueezeExcitation(nn.Module):
    """Channels weighed by a gate that sees the whole image (Hu et al. 2018), reduction 4."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape."""
        scale = self.expand(self.reduce(self.pool(x)).relu())
        return cast("Tensor", x * self.gate(scale))


def divisible(value: float, divisor: int) -> int:
    """``value`` to the nearest multiple of ``divisor``, at least that, at most 10 % less.

    The rounding of MobileNetV2's widths (Sandler et al. 2018), which ESNet took over.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
