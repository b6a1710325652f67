"""Knowledge distillation on class scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["kd"]


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Softened cross-entropy of Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), as a divergence.

    With ``p = softmax(logits / τ)`` over the classes, the loss is

        ``τ² · mean_n Σ_c p_T[n, c] · (log p_T[n, c] − log p_S[n, c])``

    so it is 0 when the student agrees. The factor τ² keeps the gradient's size independent of
    the temperature (section 2 of the paper).

    Args:
        student: logits (N, C), or (N, C, …) with one distribution per position; the mean is
            then over samples and positions.
        teacher: logits of the same shape.
        temperature: τ > 0; larger values show more of the small probabilities.

    Returns:
        A scalar ≥ 0, float32.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(dim=1).mean() * temperature**2
