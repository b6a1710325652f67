"""Convolutions that oneDNN trains slowly or wrongly on a CPU, by another of its kernels.

The result is the same. A strided depthwise convolution runs at stride 1, of which every other
pixel is kept: the backward pass of the strided kernel is so slow in bf16 (torch 2.14) that a
MobileNet trains slower in bf16 than in float32; measured by ``python -m
benchmarks.depthwise_training``. Depthwise convolutions of other sizes than 3×3 run in float32 at
their own stride: for 5×5 on 40×40 pixels forward and backward take 31 ms instead of 146 ms (batch
of 16, 96 channels). A 1×1 convolution of few channels gets every other pixel: in channels_last the
backward pass of the strided kernel writes beyond its memory
(https://github.com/uxlfoundation/oneDNN/issues/6035), which ends the process or spoils the
gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["at_stride_one"]

_LARGEST_FAST_KERNEL = 3
"""Rows and columns of the largest depthwise kernel that trains faster in bf16 than in float32."""

_BLOCK = 16  # channels that a kernel takes at once, with AVX-512; half of them without


@contextlib.contextmanager
def at_stride_one(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, such convolutions train by another kernel: depthwise ones under bf16 autocast only.

    Args:
        model: its convolutions get another ``forward``, and their own back at the end.
        device: where it trains; nothing is changed for another one than the CPU.
    """
    chosen = _slow(model) if device.type == "cpu" else []
    for conv in chosen:
        conv.forward = partial(_replacement(conv), conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in chosen:
            del conv.forward


def _slow(model: nn.Module) -> list[nn.Conv2d]:
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d]
    return [
        conv
        for conv in convolutions
        if conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and "forward" not in vars(conv)
        and (
            _is_large_depthwise(conv)
            or (max(conv.stride) > 1 and (_few_pointwise(conv) or _is_depthwise(conv)))
        )
    ]


def _replacement(conv: nn.Conv2d) -> Callable[[nn.Conv2d, Tensor], Tensor]:
    if _is_large_depthwise(conv):
        return _in_float
    return _pointwise if _few_pointwise(conv) else _depthwise


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels > 1


def _is_large_depthwise(conv: nn.Conv2d) -> bool:
    """Whether it is a depthwise one for which there is no fast bf16 kernel."""
    return _is_depthwise(conv) and max(conv.kernel_size) > _LARGEST_FAST_KERNEL


def _few_pointwise(conv: nn.Conv2d) -> bool:
    """Whether it is a 1×1 convolution with fewer channels than a kernel's block."""
    inputs = conv.in_channels // conv.groups
    return (*conv.kernel_size, *conv.padding) == (1, 1, 0, 0) and inputs < _BLOCK


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return nn.Conv2d.forward(conv, x)
    kept = _every(x, conv.stride)
    return F.conv2d(kept, conv.weight, conv.bias, groups=conv.groups)


def _in_float(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not _in_bf16_training():
        return nn.Conv2d.forward(conv, x)
    with torch.autocast("cpu", enabled=False):
        return nn.Conv2d.forward(conv, x.float()).to(torch.get_autocast_dtype("cpu"))


def _in_bf16_training() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not _in_bf16_training():
        return nn.Conv2d.forward(conv, x)
    dense = F.conv2d(x, conv.weight, conv.bias, 1, conv.padding, conv.dilation, conv.groups)
    return _every(dense, conv.stride)


def _every(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Every so many rows and columns, (..., H, W), in the layout that ``x`` has."""
    layout = torch.contiguous_format
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return x[..., :: stride[0], :: stride[1]].contiguous(memory_format=layout)
