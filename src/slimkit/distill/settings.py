"""All distillation losses that a recipe can name; their interface is in ``interface``."""

from __future__ import annotations

from slimkit.distill.feature_losses import CWD, L1, OFD, PKD, ActivationBoundary, Mimic
from slimkit.distill.function_loss import FunctionLoss
from slimkit.distill.interface import DISTILL_LOSSES, DistillLoss, parse_losses
from slimkit.distill.logit_losses import DIST, DKD, KD, WSLD, SoftCrossEntropy
from slimkit.distill.relation_losses import FSP, AttentionTransfer, RKDAngle, RKDDistance
from slimkit.distill.trained_losses import BYOT, CRD, FBKD, MGD, FactorTransfer

__all__ = [
    "BYOT",
    "CRD",
    "CWD",
    "DIST",
    "DISTILL_LOSSES",
    "DKD",
    "FBKD",
    "FSP",
    "KD",
    "L1",
    "MGD",
    "OFD",
    "PKD",
    "WSLD",
    "ActivationBoundary",
    "AttentionTransfer",
    "DistillLoss",
    "FactorTransfer",
    "FunctionLoss",
    "Mimic",
    "RKDAngle",
    "RKDDistance",
    "SoftCrossEntropy",
    "parse_losses",
]
