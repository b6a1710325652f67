"""One-shot magnitude pruning: a mask plan from the weights as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.sparsify.eligible import Eligible, Skip, eligible_weights
from slimkit.sparsify.magnitude import check_sparsity, magnitude_masks, threshold_masks
from slimkit.sparsify.masks import MaskPlan
from slimkit.sparsify.patterns import NofM, SparsityPattern

__all__ = ["plan"]


@door
def plan(
    model: nn.Module,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
    pattern: SparsityPattern | None = None,
    only: str | Pattern | Iterable[Pattern] | None = None,
    skip: Skip | Iterable[Skip] = (),
) -> MaskPlan:
    """Magnitude pruning at once: the smallest weights become zero when the plan is applied.

    Train afterwards with :class:`~slimkit.sparsify.holding.HoldZeros`; a gradual schedule
    (:class:`~slimkit.sparsify.gradual.GradualPruner`) loses less at high sparsity.

    Args:
        model: not changed.
        sparsity: fraction of zeros, above 0 and below 1; or pattern of layers → fraction, where
            layers that no pattern names stay dense. N:M patterns need none.
        threshold: in place of a sparsity, weights of a smaller magnitude become zero.
        scope: ``"layer"``: each layer has this sparsity; ``"global"``: all of them together.
        pattern: ``NofM(2, 4)``, ``Block(2, 1)``, or None for single weights.
        only: ``"conv1x1"``, or patterns of modules whose weights alone may become zero.
        skip: patterns of modules that stay dense, or functions ``f(name, module, weight)``.

    Raises:
        InputError: not exactly one of sparsity, threshold and an N:M pattern is given, or one of
            them is out of range.
        PatternError: a pattern of layers matches nothing.
        PlanError: no weight may become zero, or weights are not finite.
    """
    given = [sparsity is not None, threshold is not None, isinstance(pattern, NofM)]
    if sum(given) != 1:
        raise InputError(
            "expected exactly one of a sparsity, a threshold and an N:M pattern",
            where="sparsity",
            hint="sparsity=0.75",
        )
    if threshold is not None and (pattern is not None or scope != "layer"):
        raise InputError("a threshold knows neither pattern nor scope", where="threshold")
    found = eligible_weights(model, only=only, skip=skip)
    found, shares = _shares(model, found, sparsity)
    found = fitting(found, pattern)
    if threshold is not None:
        masks = threshold_masks(found.weights, threshold)
    else:
        masks = magnitude_masks(found.weights, shares or 0.0, scope=scope, pattern=pattern)
    settings: dict[str, Any] = {"method": "one-shot magnitude", "scope": scope}
    settings["sparsity"] = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
    settings |= {"threshold": threshold, "pattern": str(pattern) if pattern else None}
    return mask_plan(found, masks, settings)


def fitting(found: Eligible, pattern: SparsityPattern | None) -> Eligible:
    """Those that can have the pattern.

    Raises:
        PlanError: none can.
    """
    if pattern is None:
        return found
    reasons = {name: pattern.unfit(weight) for name, weight in found.weights.items()}
    skipped = {name: why for name, why in reasons.items() if why is not None}
    if len(skipped) == len(found.weights):
        name, why = next(iter(skipped.items()))
        raise PlanError(f"no weight can have the pattern {pattern}; {name}: {why}", where="pattern")
    weights = {name: w for name, w in found.weights.items() if name not in skipped}
    return Eligible(weights, {**found.skipped, **skipped})


def mask_plan(
    found: Eligible, masks: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> MaskPlan:
    """A plan of these masks, with notes about rows that have one weight left."""
    single = {
        name: int((mask.flatten(1).sum(dim=1) == 1).sum())
        for name, mask in masks.items()
        if mask[0].numel() > 1
    }
    notes = [
        f"{name}: {count} of {len(masks[name])} outputs keep one weight"
        for name, count in single.items()
        if count
    ]
    held = {name: mask.detach().to("cpu", torch.bool).clone() for name, mask in masks.items()}
    return MaskPlan(held, found.skipped, tuple(notes), settings)


def _shares(
    model: nn.Module, found: Eligible, sparsity: float | Mapping[str, float] | None
) -> tuple[Eligible, dict[str, float] | float | None]:
    """Those that become sparse, and the sparsity of each, where it differs."""
    if sparsity is None:
        return found, None
    if not isinstance(sparsity, Mapping):
        return found, check_sparsity(sparsity)
    shares: dict[str, float] = {}
    for pattern, share in sparsity.items():
        check_sparsity(share, f"sparsity.{pattern}")
        modules = match_modules(model, pattern, where="sparsity")
        for name in found.weights:
            if name.rpartition(".")[0] in modules:
                shares[name] = float(share)
    if not shares:
        raise PlanError("no weight that may become zero is named by a pattern", where="sparsity")
    weights = {name: weight for name, weight in found.weights.items() if name in shares}
    rest = {name: "named by no pattern" for name in found.weights if name not in shares}
    return Eligible(weights, {**found.skipped, **rest}), shares
