"""Magnitude pruning: masks that set the smallest weights to zero, to an exact count.

The threshold is the k-th smallest magnitude, found by selection on the weights' device, without
a full sort. Of weights that are exactly as large as the threshold as many stay, from the front,
as the count asks for, so that equal weights give equal masks in every process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimkit.errors import InputError
from slimkit.sparsify.eligible import check_finite
from slimkit.sparsify.patterns import Block, NofM, SparsityPattern

__all__ = ["check_sparsity", "magnitude_masks", "threshold_masks"]


def check_sparsity(value: float, where: str = "sparsity") -> float:
    """Refuse what is no fraction of zeros.

    Raises:
        InputError: it is not above 0 and below 1.
    """
    if not _is_number(value) or not 0 < value < 1:
        raise InputError(
            f"expected a fraction of zeros, above 0 and below 1, got {value!r}",
            where=where,
            hint="0.75 leaves a quarter of the weights",
        )
    return float(value)


@torch.no_grad()
def magnitude_masks(
    weights: Mapping[str, Tensor],
    sparsity: Mapping[str, float] | float,
    *,
    scope: str = "layer",
    pattern: SparsityPattern | None = None,
) -> dict[str, Tensor]:
    """Masks (True = stays) that leave the largest weights.

    Every output of a layer keeps its largest weight at least, so that no row is lost.

    Args:
        weights: by name.
        sparsity: fraction of zeros, 0 … 1, for all or by name.
        scope: ``"layer"``: every weight tensor has this sparsity. ``"global"``: all together
            have it, so that layers with small weights lose more.
        pattern: :class:`~slimkit.sparsify.patterns.NofM` fixes the sparsity itself; blocks are
            chosen like single weights; None for single weights.

    Raises:
        PlanError: a weight is not finite.
        InputError: the scope is unknown, or global sparsity is asked for layer by layer.
    """
    if scope not in ("layer", "global"):
        raise InputError(f"unknown scope {scope!r}", where="scope", hint="layer or global")
    magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
    for name, weight in magnitudes.items():
        check_finite(name, weight)
    if isinstance(pattern, NofM):
        return {name: pattern.mask(weight) for name, weight in magnitudes.items()}
    scores = {
        name: pattern.scores(weight) if isinstance(pattern, Block) else weight
        for name, weight in magnitudes.items()
    }
    if scope == "layer":
        shares = {
            name: sparsity if isinstance(sparsity, float | int) else sparsity[name]
            for name in scores
        }
        masks = {name: _largest(score, shares[name]) for name, score in scores.items()}
    else:
        if not isinstance(sparsity, float | int):
            raise InputError("a global sparsity is one number", where="sparsity")
        flat = torch.cat([score.flatten().float() for score in scores.values()])
        sizes = [score.numel() for score in scores.values()]
        parts = torch.split(_largest(flat, sparsity), sizes)
        masks = {
            name: part.view(score.shape)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    if isinstance(pattern, Block):
        masks = {name: pattern.spread(m, weights[name].shape) for name, m in masks.items()}
    return {name: keep_rows(masks[name], weight) for name, weight in magnitudes.items()}


@torch.no_grad()
def threshold_masks(weights: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Masks (True = stays) that leave weights of at least this magnitude, one per row at least.

    Raises:
        PlanError: a weight is not finite.
        InputError: the threshold is not a positive number.
    """
    if not _is_number(threshold) or not 0 < threshold < float("inf"):
        raise InputError(
            f"expected a positive magnitude, got {threshold!r}", where="threshold", hint="0.01"
        )
    masks = {}
    for name, weight in weights.items():
        check_finite(name, weight)
        magnitude = weight.detach().abs()
        masks[name] = keep_rows(magnitude >= threshold, magnitude)
    return masks


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def keep_rows(mask: Tensor, magnitude: Tensor) -> Tensor:
    """The mask, with the largest weight of each output that would lose all of them."""
    rows = mask.flatten(1)
    empty = ~rows.any(dim=1)
    largest = magnitude.flatten(1).argmax(dim=1, keepdim=True)
    saved = torch.zeros_like(rows).scatter_(1, largest, empty[:, None])
    return (rows | saved).view(mask.shape)


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """True at the largest scores, so that exactly ``round(sparsity · n)`` are False."""
    flat = scores.flatten()
    zeros = round(sparsity * flat.numel())
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if zeros >= flat.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    threshold = flat.kthvalue(zeros).values
    above = flat > threshold
    level = flat == threshold
    # as many of those at the threshold stay as are missing; the first of them go
    go = zeros - int((flat < threshold).sum())
    return (above | (level & (level.cumsum(0) > go))).view(scores.shape)
