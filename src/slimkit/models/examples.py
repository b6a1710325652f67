"""An example input for a model that is only known by its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimkit.doors import structure_door
from slimkit.errors import InputError

__all__ = ["example_input"]

_VIDEO = {"mvit": 224, "s3d": 224}
"""Start of a torchvision video network's name → pixels, where 112 are too few."""


@structure_door
def example_input(name: str, model: nn.Module, *, in_channels: int = 3) -> Any:
    """Zeros in the shape that a model of this name takes, for one example.

    Args:
        name: as for :func:`~slimkit.models.building.build_model`.
        model: what that built.
        in_channels: of images.

    Returns:
        An image ``(1, C, H, W)``; for torchvision's detectors a 1-tuple with a list of images
        ``(3, 320, 320)``, for optical flow two images, for video networks
        ``(1, 3, 16, H, W)``.
    """
    if in_channels < 1:
        raise InputError(f"expected an integer ≥ 1, got {in_channels}", where="in_channels")
    source, _, short = name.partition(":")
    if source == "slimkit":
        small = min(getattr(getattr(model, "stem", None), "stride", (1,))) == 1
        size = getattr(model, "image_size", 32 if small else 224)
        return torch.zeros(1, in_channels, size, size)
    if source == "timm":
        size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
        return torch.zeros(1, in_channels, *size[1:])
    if source == "torchvision":
        return _torchvision(short, in_channels)
    return torch.zeros(1, in_channels, 224, 224)


def _torchvision(short: str, in_channels: int) -> Any:
    from torchvision.models import get_model_builder

    parts = get_model_builder(short).__module__.split(".")
    kind = parts[2] if len(parts) > 3 else ""
    if kind == "detection":
        return ([torch.zeros(3, 320, 320)],)
    if kind == "optical_flow":
        return (torch.zeros(1, 3, 128, 128), torch.zeros(1, 3, 128, 128))
    if kind == "video":
        size = next((s for start, s in _VIDEO.items() if short.startswith(start)), 112)
        return torch.zeros(1, 3, 16, size, size)
    size = 299 if short == "inception_v3" else 224
    return torch.zeros(1, in_channels, size, size)
