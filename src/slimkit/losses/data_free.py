"""Losses of the generator in data-free distillation, which invents the images.

The generator's part only: the gradient flows through the teacher into the images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dafl_activation", "dafl_entropy", "dafl_one_hot", "dfad_gap", "zskt_gap"]


def dafl_one_hot(teacher: Tensor) -> Tensor:
    """DAFL's one-hot loss, images that the teacher is sure of: Chen et al. 2019 (arXiv 1904.01186).

    Cross-entropy of the teacher's logits (N, C) with their own arg-max.
    """
    return F.cross_entropy(teacher.float(), teacher.argmax(dim=1))


def dafl_activation(features: Tensor) -> Tensor:
    """DAFL's activation loss, large features: ``−mean |F|`` of its features (N, …)."""
    return -features.float().abs().mean()


def dafl_entropy(teacher: Tensor) -> Tensor:
    """DAFL's entropy loss, images of all classes alike: ``Σ_c p̄_c · log₁₀ p̄_c``.

    ``p̄`` is the mean over the batch of the softmax of the logits (N, C). The logarithm is to
    base 10, which the weights in use are made for.
    """
    mean = teacher.float().softmax(dim=1).mean(dim=0)
    return (mean * mean.clamp_min(1e-30).log10()).sum()


def zskt_gap(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Images on which the student fails: ZSKT, Micaelli and Storkey 2019 (arXiv 1905.09768).

    ``−KL(teacher ‖ student)``, with gradient through both.

    Args:
        student: logits (N, C).
        teacher: logits of the same shape.
        temperature: τ > 0.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return -(log_teacher.exp() * (log_teacher - log_student)).sum(dim=1).mean() * temperature**2


def dfad_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Images on which the student fails: DFAD, Fang et al. 2019 (arXiv 1912.11006).

    ``−mean |S − T|`` of the logits (N, C), with gradient through both.
    """
    return -(student.float() - teacher.float()).abs().mean()
