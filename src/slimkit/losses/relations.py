"""Losses between relations: distances of samples, Gram matrices of layers, attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attention_transfer", "fbkd", "fsp", "rkd_angle", "rkd_distance"]


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Distances between samples, Park et al. 2019 (arXiv 1904.05068), RKD-D.

    With d the Euclidean distances of all pairs of samples, each divided by their mean,

        ``mean_{i<j} Huber(d_S[i, j] − d_T[i, j])`` with δ = 1.

    Args:
        student: embeddings (N, …), N ≥ 3 to mean anything.
        teacher: embeddings (N, …); their size may be another one.
    """
    ours, theirs = _distances(student.float()), _distances(teacher.detach().float())
    return F.huber_loss(ours, theirs) if len(ours) else student.float().sum() * 0


def _distances(embeddings: Tensor) -> Tensor:
    distances = F.pdist(embeddings.flatten(1))
    return distances / distances.mean().clamp_min(1e-12) if len(distances) else distances


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Angles between samples, Park et al. 2019 (arXiv 1904.05068), RKD-A.

    With ``a[i, j, k]`` the cosine of the angle at sample j between samples i and k,

        ``mean over triplets of different samples of Huber(a_S − a_T)`` with δ = 1.

    Memory grows with N³.

    Args:
        student: embeddings (N, …), N ≥ 3 to mean anything.
        teacher: embeddings (N, …); their size may be another one.
    """
    n = len(student)
    ours, theirs = _cosines(student.float()), _cosines(teacher.detach().float())
    # where samples coincide both cosines are the same, so only the number of terms matters
    return F.huber_loss(ours, theirs, reduction="sum") / max(1, n * (n - 1) * (n - 2))


def _cosines(embeddings: Tensor) -> Tensor:
    """(N, N, N): for each sample j, the cosines between the directions to all others."""
    flat = embeddings.flatten(1)
    directions = F.normalize(flat[None] - flat[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Attention maps, Zagoruyko and Komodakis 2017 (arXiv 1612.03928), equation 2.

    With the attention map ``Q = mean_c |F|^p`` of a sample, flattened and of L2 norm 1,

        ``mean_{n, positions} (Q_S − Q_T)²``

    Args:
        student: features (N, C, H, W).
        teacher: features (N, C', H, W); the number of channels may be another one.
        power: p ≥ 1; larger values see only the most active places.
    """
    ours, theirs = _attention(student.float(), power), _attention(teacher.detach().float(), power)
    return F.mse_loss(ours, theirs)


def _attention(features: Tensor, power: float) -> Tensor:
    return F.normalize(features.abs().pow(power).mean(dim=1).flatten(1), dim=1)


def fsp(student: Tensor, teacher: Tensor, student_late: Tensor, teacher_late: Tensor) -> Tensor:
    """FSP matrices, Yim et al. 2017, "A gift from knowledge distillation", equations 1 and 2.

    A layer of C and a later one of D channels give each sample a matrix of inner products over
    the positions, ``G[c, d] = Σ_positions F[c] · F_late[d] / (H·W)``:

        ``mean_{n, c, d} (G_S − G_T)²``

    Where the two layers' maps differ in size, the larger one is brought down by its maxima.

    Args:
        student: features (N, C, H, W) of the earlier layer.
        teacher: the same with as many channels.
        student_late: features (N, D, H', W') of the later layer.
        teacher_late: the same with as many channels.
    """
    ours = _flow(student.float(), student_late.float())
    theirs = _flow(teacher.detach().float(), teacher_late.detach().float())
    return F.mse_loss(ours, theirs)


def _flow(early: Tensor, late: Tensor) -> Tensor:
    """Gram matrix over positions: (N, C, H, W), (N, D, H', W') → (N, C, D)."""
    height = min(early.shape[2], late.shape[2])
    width = min(early.shape[3], late.shape[3])
    if early.shape[2:] != (height, width):
        early = F.adaptive_max_pool2d(early, (height, width))
    if late.shape[2:] != (height, width):
        late = F.adaptive_max_pool2d(late, (height, width))
    return early.flatten(2) @ late.flatten(2).transpose(1, 2) / (height * width)


def fbkd(
    student: Tensor,
    teacher: Tensor,
    student_relation: Tensor,
    teacher_relation: Tensor,
    mask_weight: float = 7e-5,
    attention_weight: float = 4e-3,
    relation_weight: float = 7e-5,
    temperature: float = 0.1,
) -> Tensor:
    """Attention-guided and non-local distillation for detectors, Zhang and Ma 2021 (ICLR).

    With the spatial attention ``A = mean_c |F|``, the channel attention ``B = mean_positions |F|``
    and masks M = H·W · softmax((A_S + A_T)/τ) and C · softmax((B_S + B_T)/τ), without gradient,

        ``mask = mean_n sqrt(Σ M_A · M_B · (S − T)²)``
        ``attention = mean_n ‖A_S − A_T‖ + mean_n ‖B_S − B_T‖``
        ``relation = mean_n ‖R_S − R_T‖``

    each times its weight. R is the output of a non-local block on the features of a network.

    Args:
        student: features (N, C, H, W).
        teacher: the same shape.
        student_relation: R of the student, (N, C, H, W).
        teacher_relation: R of the teacher; its block is trained too, so this has gradient.
        mask_weight: ≥ 0.
        attention_weight: ≥ 0.
        relation_weight: ≥ 0.
        temperature: τ > 0 of the masks; smaller values look at fewer places.
    """
    ours, theirs = student.float(), teacher.detach().float()
    spatial_s, spatial_t = (x.abs().mean(dim=1, keepdim=True) for x in (ours, theirs))
    channel_s, channel_t = (x.abs().mean(dim=(2, 3), keepdim=True) for x in (ours, theirs))
    spatial = _mask((spatial_s + spatial_t).detach() / temperature)
    channel = _mask((channel_s + channel_t).detach() / temperature)
    masked = _norm((ours - theirs) * (spatial * channel).sqrt())
    attention = _norm(spatial_s - spatial_t) + _norm(channel_s - channel_t)
    relation = _norm(student_relation.float() - teacher_relation.float())
    return mask_weight * masked + attention_weight * attention + relation_weight * relation


def _mask(scores: Tensor) -> Tensor:
    """Softmax over all but the first dimension, with mean 1."""
    flat = scores.flatten(1)
    return (flat.softmax(dim=1) * flat.shape[1]).view_as(scores)


def _norm(difference: Tensor) -> Tensor:
    """The mean over samples of the L2 norm; its gradient at 0 is 0."""
    norms: Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    return norms.mean()
