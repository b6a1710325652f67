"""Pearson correlation as a loss: the student may differ from the teacher by shift and scale."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dist", "pkd"]


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of corresponding rows: (R, K), (R, K) → (R,); 0 for a constant row."""
    a = F.normalize(a - a.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    b = F.normalize(b - b.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    return (a * b).sum(dim=1)


def dist(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST of Huang et al. 2022 (arXiv 2205.10536), equations 7 to 10.

    With ``Y = softmax(logits / τ)`` of shape (N, C) and Pearson's correlation ρ,

        ``inter = 1 − mean_n ρ(Y_S[n, :], Y_T[n, :])``  (relations between classes)
        ``intra = 1 − mean_c ρ(Y_S[:, c], Y_T[:, c])``  (relations between samples)
        ``loss = τ² · (β · inter + γ · intra)``

    Args:
        student: logits (N, C); N ≥ 2 for the intra-class term to mean anything.
        teacher: logits of the same shape.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.
        temperature: τ > 0.

    Returns:
        A scalar in [0, 2τ²(β + γ)], float32.
    """
    soft_student = (student.float() / temperature).softmax(dim=1)
    soft_teacher = (teacher.detach().float() / temperature).softmax(dim=1)
    inter = 1 - _pearson(soft_student, soft_teacher).mean()
    intra = 1 - _pearson(soft_student.t(), soft_teacher.t()).mean()
    return (beta * inter + gamma * intra) * temperature**2


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson correlation of feature maps, Cao et al. 2022 (arXiv 2207.02039).

    Each channel is standardised over all samples and positions of the batch; half the mean
    square of the difference is then

        ``1 − mean_c ρ(S[:, c], T[:, c])``

    so that neither the magnitude of a map nor that of single channels counts.

    Args:
        student: features (N, C, …).
        teacher: features of the same shape.

    Returns:
        A scalar in [0, 2], float32.
    """
    ours = student.float().transpose(0, 1).flatten(1)
    theirs = teacher.detach().float().transpose(0, 1).flatten(1)
    return 1 - _pearson(ours, theirs).mean()
