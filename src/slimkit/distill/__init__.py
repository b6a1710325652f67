"""Distillation: a student learns from a teacher's outputs and features.

::

    distiller = Distiller(student, teacher, losses=[KD(temperature=4.0)])
    outputs = student(images)
    loss = F.cross_entropy(outputs, labels) + distiller.loss(images, outputs)

Features need example inputs, so that connectors exist before the optimizer is built::

    distiller = Distiller(
        student, teacher, losses=[Mimic(student="layer3")], example_inputs=images[:2]
    )
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1)
"""

from __future__ import annotations

from slimkit.distill.data_free import DAFL, DFAD, GENERATION, ZSKT, GeneratedBatches
from slimkit.distill.distilling import Distiller
from slimkit.distill.losses.catalogue import (
    BYOT,
    CRD,
    CWD,
    DIST,
    DISTILL_LOSSES,
    DKD,
    FBKD,
    FSP,
    KD,
    L1,
    MGD,
    OFD,
    PKD,
    WSLD,
    ActivationBoundary,
    AttentionTransfer,
    DistillLoss,
    FactorTransfer,
    FunctionLoss,
    LocalizationKD,
    Mimic,
    QualityKD,
    RKDAngle,
    RKDDistance,
    SoftCrossEntropy,
    parse_losses,
)
from slimkit.distill.losses.connectors import CONNECTORS, ConnectorSettings
from slimkit.distill.losses.schedules import WeightSchedule
from slimkit.distill.mutual import MutualLearning
from slimkit.distill.recording.delivery import Delivery
from slimkit.distill.recording.records import Record, RecordPath

__all__ = [
    "BYOT",
    "CONNECTORS",
    "CRD",
    "CWD",
    "DAFL",
    "DFAD",
    "DIST",
    "DISTILL_LOSSES",
    "DKD",
    "FBKD",
    "FSP",
    "GENERATION",
    "KD",
    "L1",
    "MGD",
    "OFD",
    "PKD",
    "WSLD",
    "ZSKT",
    "ActivationBoundary",
    "AttentionTransfer",
    "ConnectorSettings",
    "Delivery",
    "DistillLoss",
    "Distiller",
    "FactorTransfer",
    "FunctionLoss",
    "GeneratedBatches",
    "LocalizationKD",
    "Mimic",
    "MutualLearning",
    "QualityKD",
    "RKDAngle",
    "RKDDistance",
    "Record",
    "RecordPath",
    "SoftCrossEntropy",
    "WeightSchedule",
    "parse_losses",
]
