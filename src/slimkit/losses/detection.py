"""Losses, distillation and label assignment of one-stage detectors: VFL, DFL, GIoU, SimOTA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_area, box_iou, generalized_box_iou, generalized_box_iou_loss

__all__ = [
    "box_iou_pairs",
    "distribution_focal",
    "giou",
    "localization_distillation",
    "quality_distillation",
    "simota",
    "varifocal",
]


def varifocal(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Varifocal loss, elementwise (Zhang et al. 2021, "VarifocalNet", equation 2).

    Cross-entropy with a target quality q, weighted by q where q > 0 and by α · pᵞ elsewhere.

    Args:
        logits: class scores before the sigmoid.
        targets: quality (IoU) of each class, 0 … 1; 0 for what is not there.
        alpha: factor of the weight of negatives.
        gamma: its exponent; easy negatives count less.

    Returns:
        Of the shape of ``logits``; the paper divides the sum by the number of positives.
    """
    negatives = alpha * logits.detach().sigmoid().pow(gamma)
    weight = torch.where(targets > 0, targets, negatives)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return weight * loss


def distribution_focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Distribution focal loss (Li et al. 2020, "Generalized Focal Loss", equation 6).

    The cross-entropy of the two whole distances around each target, weighted by nearness.

    Args:
        logits: (P, 4 · bins).
        targets: distances in strides, (P, 4), at least 0 and below ``bins − 1``.

    Returns:
        (P,), the mean over the four sides.
    """
    by_side = logits.reshape(-1, logits.shape[-1] // 4)
    wanted = targets.flatten()
    lower = wanted.floor().long()
    nearness = wanted - lower
    low = F.cross_entropy(by_side, lower, reduction="none")
    high = F.cross_entropy(by_side, lower + 1, reduction="none")
    return (low * (1 - nearness) + high * nearness).view(-1, 4).mean(1)


def giou(boxes: Tensor, targets: Tensor) -> Tensor:
    """``1 − GIoU`` of boxes (P, 4) and their targets, (P,) (Rezatofighi et al. 2019)."""
    loss: Tensor = generalized_box_iou_loss(boxes, targets)
    return loss


def quality_distillation(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Quality focal loss towards a teacher's scores (Wang et al. 2024, "CrossKD", equation 5).

    ``Σ |σ(t) − σ(s)|^β · BCE(s, σ(t)) / Σ_cells max_class σ(t)``: what both agree on counts
    little, and the sum of the teacher's best scores stands for the number of objects. The
    entropy of σ(t) is taken off, so that it is 0 where the student agrees.

    Args:
        student: logits (N, cells, classes).
        teacher: logits of the same shape.
        beta: exponent ≥ 0 of the difference.

    Returns:
        A scalar ≥ 0, float32.
    """
    ours, wanted = student.float(), teacher.detach().float().sigmoid()
    weight = (wanted - ours.detach().sigmoid()).abs().pow(beta)
    excess = F.binary_cross_entropy_with_logits(ours, wanted, reduction="none")
    excess = excess - F.binary_cross_entropy(wanted, wanted, reduction="none")
    return (weight * excess).sum() / wanted.amax(-1).sum().clamp(min=1)


def localization_distillation(
    student: Tensor,
    teacher: Tensor,
    teacher_scores: Tensor,
    *,
    bins: int = 8,
    temperature: float = 2.0,
) -> Tensor:
    """Localization distillation (Zheng et al. 2022, "Localization Distillation", equation 4).

    The divergence ``τ² · KL(softmax(t/τ) ‖ softmax(s/τ))`` of each side's distribution, or with
    one number per side the smooth L1 distance; the mean over all cells, weighted by the teacher's
    best score: only where it sees something does it know where that lies.

    Args:
        student: logits of distances (N, cells, 4 · bins).
        teacher: of the same shape.
        teacher_scores: the teacher's class logits (N, cells, classes).
        bins: distances per side, at least 1.
        temperature: τ > 0.

    Returns:
        A scalar ≥ 0, float32.
    """
    ours, theirs = student.float(), teacher.detach().float()
    weight = teacher_scores.detach().float().sigmoid().amax(-1)
    if bins == 1:
        distance = F.smooth_l1_loss(ours, theirs, reduction="none").mean(-1)
    else:
        ours, theirs = (
            (x.reshape(*x.shape[:-1], 4, bins) / temperature).log_softmax(-1)
            for x in (ours, theirs)
        )
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        distance = divergence.mean(-1) * temperature**2
    return (distance * weight).sum() / weight.sum().clamp(min=1)


def box_iou_pairs(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box with the other of its row: (P, 4) twice → (P,)."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    overlap: Tensor = shared / (box_area(boxes) + box_area(others) - shared)
    return overlap


@torch.no_grad()
def simota(
    logits: Tensor,
    boxes: Tensor,
    centres: Tensor,
    strides: Tensor,
    truth_boxes: Tensor,
    truth_labels: Tensor,
    *,
    radius: float = 2.5,
    top: int = 10,
    iou_weight: float = 6.0,
) -> Tensor:
    """Which cell predicts which object: SimOTA (Ge et al. 2021, "YOLOX", section 2.1).

    Candidates are cells inside a box or near its centre. Each object takes as many of them as
    the sum of its ``top`` best IoUs says, those of least cost; a cell that several want goes to
    the one of least cost. The cost is PicoDet's: varifocal loss + ``iou_weight`` · (1 − GIoU),
    and 10⁸ outside of box and centre.

    Args:
        logits: class scores before the sigmoid, (A, classes).
        boxes: predicted, x1, y1, x2, y2 in pixels, (A, 4).
        centres: of the cells in pixels, (A, 2).
        strides: of the cells in pixels, (A,).
        truth_boxes: (G, 4).
        truth_labels: int64 (G,).
        radius: of the centre region, in strides.
        top: IoUs that decide how many cells an object gets.
        iou_weight: of GIoU in the cost.

    Returns:
        Number of the object of each cell, −1 for background, int64 (A,).
    """
    assigned = torch.full((len(boxes),), -1, dtype=torch.long, device=boxes.device)
    if not len(truth_boxes):
        return assigned
    inside = _inside(centres, truth_boxes)
    middle = (truth_boxes[:, :2] + truth_boxes[:, 2:]) / 2
    near = (centres[:, None] - middle).abs().amax(-1) < radius * strides[:, None]
    candidates = (inside | near).any(1).nonzero().flatten()
    if not len(candidates):
        return assigned
    candidate_boxes = boxes[candidates]
    overlap = box_iou(candidate_boxes, truth_boxes)
    cost = _score_cost(logits[candidates], truth_labels, overlap)
    cost = cost + iou_weight * (1 - generalized_box_iou(candidate_boxes, truth_boxes))
    cost = cost + 1e8 * ~(inside & near)[candidates]
    shares = overlap.topk(min(top, len(candidates)), dim=0).values.sum(0).int().clamp(min=1)
    cheapest = cost.topk(int(shares.max()), dim=0, largest=False).indices
    within = torch.arange(len(cheapest), device=cost.device)[:, None] < shares
    matched = torch.zeros_like(cost, dtype=torch.bool).scatter_(0, cheapest, within)
    several = matched.sum(1) > 1
    best = cost[several].argmin(1)
    matched[several] = F.one_hot(best, len(truth_boxes)).bool()
    taken = matched.any(1)
    assigned[candidates[taken]] = matched[taken].int().argmax(1)
    return assigned


def _score_cost(scores: Tensor, labels: Tensor, overlap: Tensor) -> Tensor:
    """Varifocal loss of every pair of a cell and an object, summed over the classes.

    Only the object's own class has a target that depends on the pair, so the others are summed
    once per cell: scores (A, classes), labels (G,), overlap (A, G) → (A, G).
    """
    absent = varifocal(scores, torch.zeros_like(scores))
    own = varifocal(scores[:, labels], overlap.to(scores.dtype))
    return absent.sum(1, keepdim=True) - absent[:, labels] + own


def _inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(A, 2) points in (G, 4) boxes → bool (A, G)."""
    before = points[:, None] > boxes[None, :, :2]
    behind = points[:, None] < boxes[None, :, 2:]
    return (before & behind).all(-1)
