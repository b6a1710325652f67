"""Losses between logits: softened cross-entropy and its variants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dkd", "kd", "soft_cross_entropy", "standardized", "wsld"]


def standardized(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes: (N, C, …) → the same.

    ``(z − mean_c z) / std_c z`` with the standard deviation of all C scores: Sun et al. 2024,
    "Logit standardization in knowledge distillation" (arXiv 2403.01427).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).add(1e-14).sqrt()


def kd(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    standardize: bool = False,
    sample_weights: Tensor | None = None,
) -> Tensor:
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
        standardize: give both logits mean 0 and standard deviation 1 first, see
            :func:`standardized`: the student then need not match the teacher's scale.
        sample_weights: (N,), factors of the samples' terms in the mean.

    Returns:
        A scalar ≥ 0, float32.
    """
    ours, theirs = student.float(), teacher.detach().float()
    if standardize:
        ours, theirs = standardized(ours), standardized(theirs)
    log_student = F.log_softmax(ours / temperature, dim=1)
    log_teacher = F.log_softmax(theirs / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
    return weighted_mean(divergence, sample_weights) * temperature**2


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of (N, …), each sample's values times its weight (N,)."""
    if weights is not None:
        values = values * weights.view(-1, *[1] * (values.dim() - 1))
    return values.mean()


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the teacher's class probabilities as targets (Hinton et al. 2015).

    ``−τ² · mean_n Σ_c p_T[n, c] · log p_S[n, c]``: the gradient of :func:`kd`, but the value
    ends at the teacher's entropy instead of 0.

    Args:
        student: logits (N, C) or (N, C, …).
        teacher: logits of the same shape.
        temperature: τ > 0.
        sample_weights: (N,), factors of the samples' terms in the mean.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    soft_teacher = F.softmax(teacher.detach().float() / temperature, dim=1)
    cross_entropy = -(soft_teacher * log_student).sum(dim=1)
    return weighted_mean(cross_entropy, sample_weights) * temperature**2


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation of Zhao et al. 2022 (arXiv 2203.08679), equation 7.

    With p the softened probabilities and t the label's class, ``b = (p_t, 1 − p_t)`` says how
    sure a network is of the label, and ``p̂`` is the distribution over the other classes alone:

        ``τ² · mean_n [α · KL(b_T ‖ b_S) + β · KL(p̂_T ‖ p̂_S)]``

    :func:`kd` is the same with β = 1 − p_t of the teacher, which hides what it knows about the
    other classes just where it is sure.

    Args:
        student: logits (N, C), C ≥ 3.
        teacher: logits of the same shape.
        labels: class numbers (N,).
        alpha: weight of the target-class term.
        beta: weight of the non-target-class term.
        temperature: τ > 0.
    """
    target_s, others_s = _decoupled(student.float() / temperature, labels)
    target_t, others_t = _decoupled(teacher.detach().float() / temperature, labels)
    target = (target_t.exp() * (target_t - target_s)).sum(dim=1).mean()
    others = (others_t.exp() * (others_t - others_s)).sum(dim=1).mean()
    return (alpha * target + beta * others) * temperature**2


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, any other class), (N, 2), and of the others, (N, C − 1)."""
    is_label = F.one_hot(labels, logits.shape[1]).bool()
    others = logits[~is_label].view(len(logits), -1)
    both = torch.stack([logits[is_label], others.logsumexp(dim=1)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(others, dim=1)


def wsld(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Weighted soft labels of Zhou et al. 2021 (arXiv 2102.00650).

    Soft labels help most where the student is worse than the teacher on the hard label:

        ``τ² · mean_n w_n · (−Σ_c p_T[n, c] · log p_S[n, c])``, with
        ``w_n = 1 − exp(−CE(S_n, y_n) / CE(T_n, y_n))`` at τ = 1 and without gradient.

    Args:
        student: logits (N, C).
        teacher: logits of the same shape.
        labels: class numbers (N,).
        temperature: τ > 0.
    """
    ours, theirs = student.float(), teacher.detach().float()
    hard_student = F.cross_entropy(ours.detach(), labels, reduction="none")
    hard_teacher = F.cross_entropy(theirs, labels, reduction="none").clamp_min(1e-7)
    weights = 1 - (-hard_student / hard_teacher).exp()
    return soft_cross_entropy(ours, theirs, temperature, weights)
