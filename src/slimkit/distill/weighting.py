"""Weights of several teachers: fixed, or by each teacher's confidence on each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.errors import InputError, nearest

__all__ = [
    "TeacherWeights",
    "Teachers",
    "confidence_weights",
    "fixed_weights",
    "module_name",
    "named_teachers",
]

Teachers = nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module] | None
"""One teacher, several by name or number, or None: the student teaches itself."""

TeacherWeights = Mapping[str, float] | Sequence[float] | str | None
"""Of several teachers: fixed ones, ``"confidence"`` on each sample, or None for equal ones."""

SINGLE = "teacher"
"""The name of a teacher that is alone."""


def module_name(teacher: str) -> str:
    """The name of a teacher as that of a submodule, which has no dots: ``search:small``."""
    return teacher.replace(".", ":")


def named_teachers(teachers: Teachers) -> dict[str, nn.Module]:
    """Name → teacher; one alone is called ``teacher``, those of a list by their number.

    Raises:
        InputError: something is no module, or a name is empty or too like another.
    """
    if teachers is None:
        return {}
    if isinstance(teachers, nn.Module):
        return {SINGLE: teachers}
    named = (
        dict(teachers)
        if isinstance(teachers, Mapping)
        else {str(number): teacher for number, teacher in enumerate(teachers)}
    )
    for name, teacher in named.items():
        if not isinstance(teacher, nn.Module):
            raise InputError(
                f"expected a module, got {type(teacher).__name__}", where=f"teacher.{name}"
            )
        if not name or any(module_name(name) == module_name(o) for o in named if o != name):
            raise InputError(f"{name!r} is no name for a teacher", where="teacher")
    if not named:
        raise InputError("there is no teacher in it", where="teacher", hint="None teaches itself")
    return named


def fixed_weights(weights: TeacherWeights, names: Sequence[str]) -> dict[str, float]:
    """Teacher → its weight; equal ones of sum 1 unless they are given.

    Raises:
        InputError: a weight is missing, negative or not finite, or of no teacher.
    """
    where = "teacher_weights"
    if weights is None or weights == "confidence":
        return dict.fromkeys(names, 1 / max(1, len(names)))
    if isinstance(weights, str):
        raise InputError(
            f"unknown weighting {weights!r}", where=where, hint=nearest(weights, ["confidence"])
        )
    given = weights if isinstance(weights, Mapping) else dict(zip(names, weights, strict=False))
    for name in given:
        if name not in names:
            raise InputError(
                f"there is no teacher {name!r}", where=where, hint=nearest(name, names)
            )
    missing = [name for name in names if name not in given]
    if missing or len(weights) != len(names):
        raise InputError(
            f"{len(weights)} weights for {len(names)} teachers", where=where, hint="one for each"
        )
    for name, weight in given.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f"expected a number ≥ 0, got {weight!r}", where=f"{where}.{name}")
    return {name: float(given[name]) for name in names}


def confidence_weights(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """How much each of K teachers counts on each sample (Zhang et al. 2022).

    With ``CE[k, n]`` the cross-entropy of teacher k with the label of sample n,

        ``w[k, n] = (1 − softmax_k(CE)[k, n]) / (K − 1)``

    so that who is surer of the right class counts more; over the teachers they sum to 1.

    Args:
        logits: K of shape (N, C).
        labels: class numbers (N,).

    Returns:
        (K, N); ones for K = 1.
    """
    losses = torch.stack([F.cross_entropy(x.float(), labels, reduction="none") for x in logits])
    if len(logits) == 1:
        return torch.ones_like(losses)
    return (1 - losses.softmax(dim=0)) / (len(logits) - 1)
