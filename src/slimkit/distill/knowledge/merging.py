"""Ensembling: the outputs of several teachers for one key as their mean, sum or weighted mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from slimkit.errors import InputError, nearest

__all__ = ["Merge", "MergeRule", "check_merge", "merge"]

MergeRule = Literal["mean", "sum", "confidence"]
Merge = MergeRule | Sequence[float] | Mapping[str, MergeRule | Sequence[float]]
"""One rule for all keys, or key → rule; numbers are one weight per teacher, in their order."""


def check_merge(rule: Merge, teachers: int) -> None:
    """Make sure that a rule can be followed.

    Args:
        rule: as given.
        teachers: how many there are.

    Raises:
        InputError: no such rule, or not one positive weight per teacher.
    """
    if isinstance(rule, Mapping):
        for part in rule.values():
            check_merge(part, teachers)
        return
    if isinstance(rule, str):
        if rule not in get_args(MergeRule):
            raise InputError(
                f"there is no rule {rule!r}",
                where="merge",
                hint=nearest(rule, get_args(MergeRule)) + " Weights, one per teacher, are another",
            )
        return
    weights = list(rule)
    if len(weights) != teachers or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise InputError(
            f"expected {teachers} weights of at least 0, one per teacher, got {weights}",
            where="merge",
        )
    if not sum(weights):
        raise InputError("all weights are 0", where="merge")


def merge(records: Sequence[Tensor], rule: Merge, key: str, teachers: Sequence[int]) -> Tensor:
    """Merge one key.

    ``"confidence"`` weighs each teacher, sample by sample, with the largest probability in the
    softmax of its scores.

    Args:
        records: one (B, …) per teacher that has the key, all of one shape.
        rule: a checked rule.
        key: its name.
        teachers: places of those teachers among all of them.

    Returns:
        (B, …) in float32; one record alone is returned as it is.
    """
    if len(records) == 1:
        return records[0]
    if isinstance(rule, Mapping):
        return merge(records, rule.get(key, "mean"), key, teachers)
    stacked = torch.stack([record.float() for record in records])
    if rule == "sum":
        return stacked.sum(0)
    if rule == "mean":
        return stacked.mean(0)
    if rule == "confidence":
        weights = stacked.softmax(2).amax(2, keepdim=True)  # (teachers, B, 1)
        return (stacked * weights).sum(0) / weights.sum(0)
    chosen = torch.tensor([float(rule[place]) for place in teachers])
    weighted: Tensor = torch.tensordot(chosen / chosen.sum(), stacked, dims=1)
    return weighted
