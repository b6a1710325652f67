"""Strided depthwise convolutions in bf16 on a CPU: at stride 1, then every other pixel.

The result is the same. The backward pass of the strided kernel is so slow in bf16 (oneDNN, torch
2.14) that a MobileNet trains slower in bf16 than in float32; without it, faster. Measured by
``python -m benchmarks.depthwise_training``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["dense_depthwise"]


@contextlib.contextmanager
def dense_depthwise(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, strided depthwise convolutions train at stride 1 under bf16 autocast on a CPU.

    Args:
        model: its convolutions get another ``forward``, and their own back at the end.
        device: where it trains; nothing is changed for another one than the CPU.
    """
    chosen = _strided_depthwise(model) if device.type == "cpu" else []
    for module in chosen:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _strided_depthwise(model: nn.Module) -> list[nn.Conv2d]:
    convolutions = [module for module in model.modules() if type(module) is nn.Conv2d]
    return [
        conv
        for conv in convolutions
        if conv.groups == conv.in_channels > 1
        and max(conv.stride) > 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and "forward" not in vars(conv)
    ]


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    if not (torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()):
        return nn.Conv2d.forward(module, x)
    rows, columns = module.stride
    dense = F.conv2d(
        x, module.weight, module.bias, 1, module.padding, module.dilation, module.groups
    )
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
    part = dense[..., ::rows, ::columns]
    return part.contiguous(memory_format=layout) if layout is not None else part.contiguous()
