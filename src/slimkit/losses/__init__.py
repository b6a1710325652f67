"""Losses as pure functions: tensors in, one scalar out, no state and no model.

Distillation losses take ``(student, teacher)`` and what else they compare. They compute in
float32 whatever they are given, and the gradient flows into the student only.
"""

from __future__ import annotations

from slimkit.losses.contrastive import crd
from slimkit.losses.correlation import dist, pkd
from slimkit.losses.data_free import (
    dafl_activation,
    dafl_entropy,
    dafl_one_hot,
    dfad_gap,
    zskt_gap,
)
from slimkit.losses.feature import activation_boundary, cwd, factor_transfer, l1, mimic, ofd
from slimkit.losses.logits import dkd, kd, soft_cross_entropy, wsld
from slimkit.losses.relations import attention_transfer, fbkd, fsp, rkd_angle, rkd_distance

__all__ = [
    "activation_boundary",
    "attention_transfer",
    "crd",
    "cwd",
    "dafl_activation",
    "dafl_entropy",
    "dafl_one_hot",
    "dfad_gap",
    "dist",
    "dkd",
    "factor_transfer",
    "fbkd",
    "fsp",
    "kd",
    "l1",
    "mimic",
    "ofd",
    "pkd",
    "rkd_angle",
    "rkd_distance",
    "soft_cross_entropy",
    "wsld",
    "zskt_gap",
]
