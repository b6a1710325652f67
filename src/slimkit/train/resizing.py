"""Smaller images for a part of the training."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

__all__ = ["resized"]


def resized(inputs: Any, size: int | None) -> Any:
    """Inputs whose images have ``size`` rows and columns.

    Args:
        inputs: of a model: tensors in any nesting; images are floating point (N, C, H, W).
        size: pixels; None returns ``inputs`` as they are.

    Returns:
        The same nesting, images resized bilinearly with antialiasing, memory formats kept.
    """
    if size is None:
        return inputs

    def on_leaf(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.is_floating_point()):
            return leaf
        return F.interpolate(
            leaf, (size, size), mode="bilinear", align_corners=False, antialias=True
        )

    return tree_map(on_leaf, inputs)
