"""Fixed random splits that keep the proportions of the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkit.errors import DataError

__all__ = ["stratified"]


def stratified(labels: Tensor, held_out: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices so that each class gives its share to the held-out part.

    Args:
        labels: int64 (N,).
        held_out: how many indices the second part gets, 0 … N - 1.
        seed: which split.

    Returns:
        Indices of the rest and of the held-out part, each ascending. The shares are rounded by
        the largest remainder, so that exactly ``held_out`` are held out.

    Raises:
        DataError: there are not more than ``held_out`` labels.
    """
    count = len(labels)
    if not 0 <= held_out < max(1, count):
        raise DataError(f"cannot hold out {held_out} of {count} images", where="data.validation")
    generator = torch.Generator().manual_seed(seed)
    labels = labels - min(0, int(labels.min())) if count else labels  # images without labels: -1
    sizes = torch.bincount(labels)
    exact = sizes.double() * held_out / max(1, count)
    quota = exact.floor().long()
    remainder = (exact - quota).argsort(descending=True, stable=True)
    quota[remainder[: held_out - int(quota.sum())]] += 1
    chosen = torch.zeros(count, dtype=torch.bool)
    for label, take in enumerate(quota.tolist()):
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        chosen[shuffled[:take]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
