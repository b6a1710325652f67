"""Unstructured and semi-structured sparsity: weights become zero and stay zero.

Masks are a plan like any other (:class:`~slimkit.sparsify.masks.MaskPlan`). One-shot magnitude
pruning proposes one (:func:`plan`); gradual magnitude pruning makes one during training
(:class:`GradualPruner`); :class:`HoldZeros` keeps the zeros of a network that is trained on::

    pruner = sk.sparsify.GradualPruner(model, sparsity=0.75, steps=len(loader) * epochs)
    ...
    optimizer.step()
    pruner.step()
    ...
    sk.apply(model, pruner.plan())
"""

from __future__ import annotations

from slimkit.sparsify.gradual import GradualPruner
from slimkit.sparsify.holding import HoldZeros
from slimkit.sparsify.masks import MaskPlan
from slimkit.sparsify.one_shot import plan
from slimkit.sparsify.patterns import Block, NofM
from slimkit.sparsify.schedule import GradualSchedule
from slimkit.sparsify.table import sparsity_table

__all__ = [
    "Block",
    "GradualPruner",
    "GradualSchedule",
    "HoldZeros",
    "MaskPlan",
    "NofM",
    "plan",
    "sparsity_table",
]
