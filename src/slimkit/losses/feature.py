"""Losses between features, element by element (hints, boundaries, channel distributions).

All of them are means over elements, so a weight keeps its meaning when width, resolution or
batch size change. Papers that write a sum over the elements of a sample mean this times C·H·W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkit.losses.logits import weighted_mean

__all__ = ["activation_boundary", "cwd", "factor_transfer", "l1", "mimic", "ofd"]


def mimic(
    student: Tensor,
    teacher: Tensor,
    normalize: bool = False,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Squared distance of features, the hint loss of FitNets (Romero et al. 2015, equation 3).

    Plain: ``mean (S − T)²`` over all elements. With ``normalize`` each position's channel
    vector is divided by its L2 norm first and the squares are summed over the channels:
    ``mean_positions ‖S/‖S‖ − T/‖T‖‖² = 2 − 2 · mean cos(S, T)``, so the scale does not
    depend on the width or the magnitude of the layer.

    Args:
        student: features (N, C, …), after a connector where the widths differ.
        teacher: features of the same shape.
        normalize: compare directions instead of values.
        sample_weights: (N,), factors of the samples' terms in the mean.

    Returns:
        A scalar ≥ 0 (≤ 4 when normalised), float32.
    """
    ours, theirs = student.float(), teacher.detach().float()
    if not normalize:
        return weighted_mean((ours - theirs).square(), sample_weights)
    distance = F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)
    return weighted_mean(distance.square().sum(dim=1), sample_weights)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Absolute distance, ``mean |S − T|``; on class scores the student's loss of DFAD.

    Args:
        student: features or logits of any shape.
        teacher: the same shape.
    """
    return F.l1_loss(student.float(), teacher.detach().float())


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """Which neurons are active, Heo et al. 2019 (arXiv 1811.03233).

    A squared hinge towards the teacher's side of zero, whatever the teacher's magnitude:

        ``mean  max(0, m − S)² where T > 0,  max(0, m + S)² elsewhere``

    Args:
        student: features in front of the activation function, any shape.
        teacher: the same shape.
        margin: m > 0, how far beyond zero is far enough.
    """
    active = teacher.detach() > 0
    ours = student.float()
    return torch.where(active, margin - ours, margin + ours).relu().square().mean()


def ofd(student: Tensor, teacher: Tensor) -> Tensor:
    """Partial L2 of Heo et al. 2019, "A comprehensive overhaul" (arXiv 1904.01866).

    ``mean (S − T)²``, but 0 where S ≤ T ≤ 0: where the teacher's value does not pass the
    activation function, the student's may be as small as it likes.

    Args:
        student: features in front of the activation function, any shape.
        teacher: the same shape, behind the margin ReLU ``max(T, m_c)``, where the margin m_c is
            the mean of the negative values of channel c.
    """
    ours, theirs = student.float(), teacher.detach().float()
    counts = (ours > theirs) | (theirs > 0)
    return ((ours - theirs).square() * counts).mean()


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation of Shu et al. 2021 (arXiv 2011.13256).

    Each channel's map becomes a distribution over positions, φ = softmax over (H, W) of F/τ:

        ``τ² · mean_{n, c} Σ_positions φ_T · (log φ_T − log φ_S)``

    so that the salient places of each channel count.

    Args:
        student: features or score maps (N, C, H, W).
        teacher: the same shape.
        temperature: τ > 0; larger values make the maps count more evenly.
    """
    log_student = F.log_softmax(student.float().flatten(2) / temperature, dim=2)
    log_teacher = F.log_softmax(teacher.detach().float().flatten(2) / temperature, dim=2)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=2).mean() * temperature**2


def factor_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Factor transfer of Kim et al. 2018 (arXiv 1802.04977) with p = 1.

    ``mean_n ‖F_S/‖F_S‖₂ − F_T/‖F_T‖₂‖₁``, each sample's factor flattened and of length 1.

    Args:
        student: the translator's output (N, …).
        teacher: the paraphraser's factor, of the same shape.
    """
    ours = F.normalize(student.float().flatten(1), dim=1)
    theirs = F.normalize(teacher.detach().float().flatten(1), dim=1)
    return (ours - theirs).abs().sum(dim=1).mean()
