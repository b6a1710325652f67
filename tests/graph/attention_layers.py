"""Small attention layers that write their sizes in the ways found in the wild."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Heads and widths as attributes, from shapes, or both; (N, T, C) → (N, T, C).

    Styles: ``"attributes"`` (timm), ``"input"`` (the width of the input is taken for that of
    the values), ``"minus"`` (−1 for the heads, as Hugging Face does), ``"scaled"`` (a scale
    from the shapes), ``"fused"`` (scaled_dot_product_attention, with a learned bias per head),
    ``"parts"`` (separate queries and a joint layer for keys and values).
    """

    def __init__(self, width: int, heads: int, style: str) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.inner = width
        self.style = style
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(1, heads, 1, 1))
        if style == "parts":
            self.qkv = nn.Linear(width, 2 * width)
            self.q = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.parts(x, b, n, c)
        if self.style == "fused":
            y = F.scaled_dot_product_attention(q, k, v, self.bias.expand(1, -1, n, n))
        else:
            scale = (c // self.num_heads) ** -0.5 if self.style == "scaled" else self.scale
            y = (q @ k.transpose(-2, -1) * scale + self.bias).softmax(-1) @ v
        y = y.transpose(1, 2)
        if self.style in ("attributes", "parts"):
            return self.proj(y.reshape(b, n, self.inner))
        return self.proj(y.reshape(b, n, c) if self.style != "minus" else y.flatten(2))

    def parts(self, x: Tensor, b: int, n: int, c: int) -> tuple[Tensor, ...]:
        heads = self.num_heads
        if self.style == "parts":
            q = self.q(x).reshape(b, n, heads, -1).transpose(1, 2)
            k, v = self.qkv(x).reshape(b, -1, 2, heads, self.head_dim).permute(2, 0, 3, 1, 4)
            return q, k, v
        if self.style == "minus":
            return tuple(
                part.view(b, n, -1, self.head_dim).transpose(1, 2)
                for part in self.qkv(x).chunk(3, dim=-1)
            )
        split = (3, heads, self.head_dim if self.style == "attributes" else c // heads)
        return self.qkv(x).reshape(b, n, *split).permute(2, 0, 3, 1, 4).unbind(0)


STYLES = ("attributes", "input", "minus", "scaled", "fused", "parts")


class Standardised(nn.Conv2d):
    """Its kernel has mean 0 and variance 1 per filter (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        kernel = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, groups=self.groups)


class Split(nn.Module):
    """Parts whose sizes are a list kept by the module."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.sizes, dim=1)
