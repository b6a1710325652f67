"""Distillation on feature maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["mimic"]


def mimic(student: Tensor, teacher: Tensor, normalize: bool = False) -> Tensor:
    """Squared distance of features, the hint loss of FitNets (Romero et al. 2015, equation 3).

    Plain: ``mean (S − T)²`` over all elements. With ``normalize`` each position's channel
    vector is divided by its L2 norm first and the squares are summed over the channels:
    ``mean_positions ‖S/‖S‖ − T/‖T‖‖² = 2 − 2 · mean cos(S, T)``, so the scale does not
    depend on the width or the magnitude of the layer.

    Args:
        student: features (N, C, …), after a connector where the widths differ.
        teacher: features of the same shape.
        normalize: compare directions instead of values.

    Returns:
        A scalar ≥ 0 (≤ 4 when normalised), float32.
    """
    ours, theirs = student.float(), teacher.detach().float()
    if not normalize:
        return F.mse_loss(ours, theirs)
    distance = F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)
    return distance.square().sum(dim=1).mean()
