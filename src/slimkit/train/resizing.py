"""Smaller images for a part of the training."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from slimkit.inputs import Batch

__all__ = ["resized"]


def resized(batch: Batch, size: int | None) -> Batch:
    """The batch with images among its inputs of ``size`` rows and columns.

    Args:
        batch: images are floating point (N, C, H, W), in any nesting; targets stay as they are.
        size: pixels; None returns ``batch`` itself.

    Returns:
        The same nesting, images resized bilinearly with antialiasing, memory formats kept.
    """
    if size is None:
        return batch

    def on_tensor(tensor: Tensor) -> Tensor:
        if not (tensor.dim() == 4 and tensor.is_floating_point()):
            return tensor
        return F.interpolate(
            tensor, (size, size), mode="bilinear", align_corners=False, antialias=True
        )

    return Batch(batch.inputs.map(on_tensor), batch.targets, batch.ids)
