"""All distillation losses that a recipe can name: importing this module registers them."""

from __future__ import annotations

from slimkit.distill.losses.boxes import LocalizationKD, QualityKD
from slimkit.distill.losses.features import CWD, L1, OFD, PKD, ActivationBoundary, Mimic
from slimkit.distill.losses.functions import FunctionLoss
from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss, parse_losses
from slimkit.distill.losses.logits import DIST, DKD, KD, WSLD, SoftCrossEntropy
from slimkit.distill.losses.relations import FSP, AttentionTransfer, RKDAngle, RKDDistance
from slimkit.distill.losses.trained import BYOT, CRD, FBKD, MGD, FactorTransfer

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
    "LocalizationKD",
    "Mimic",
    "QualityKD",
    "RKDAngle",
    "RKDDistance",
    "SoftCrossEntropy",
    "parse_losses",
]
