"""Strided convolutions that oneDNN trains slowly or wrongly on a CPU, without their strides.

The result is the same. A depthwise convolution runs at stride 1, of which every other pixel is
kept: the backward pass of the strided kernel is so slow in bf16 (torch 2.14) that a MobileNet
trains slower in bf16 than in float32; measured by ``python -m benchmarks.depthwise_training``. A
1×1 convolution of few channels gets every other pixel: in channels_last the backward pass of the
strided kernel writes beyond its memory (https://github.com/uxlfoundation/oneDNN/issues/6035),
which ends the process or spoils the gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["at_stride_one"]

_BLOCK = 16  # channels that a kernel takes at once, with AVX-512; half of them without


@contextlib.contextmanager
def at_stride_one(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, such convolutions train at stride 1 on a CPU: depthwise ones under bf16 autocast.

    Args:
        model: its convolutions get another ``forward``, and their own back at the end.
        device: where it trains; nothing is changed for another one than the CPU.
    """
    chosen = _strided(model) if device.type == "cpu" else []
    for conv in chosen:
        forward = _pointwise if _few_pointwise(conv) else _depthwise
        conv.forward = partial(forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in chosen:
            del conv.forward


def _strided(model: nn.Module) -> list[nn.Conv2d]:
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d]
    return [
        conv
        for conv in convolutions
        if max(conv.stride) > 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and "forward" not in vars(conv)
        and (_few_pointwise(conv) or conv.groups == conv.in_channels > 1)
    ]


def _few_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is a 1×1 convolution with fewer channels than a kernel's block."""
    inputs = conv.in_channels // conv.groups
    return (*conv.kernel_size, *conv.padding) == (1, 1, 0, 0) and inputs < _BLOCK


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return nn.Conv2d.forward(conv, x)
    kept = _every(x, conv.stride)
    return F.conv2d(kept, conv.weight, conv.bias, groups=conv.groups)


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return nn.Conv2d.forward(conv, x)
    dense = F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, conv.groups)
    return _every(dense, conv.stride)


def _every(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Every so many rows and columns, (..., H, W), in the layout that ``x`` has."""
    layout = torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return x[..., :: stride[0], :: stride[1]].contiguous(memory_format=layout)
