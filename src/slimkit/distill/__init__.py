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

from slimkit.distill.distilling import Distiller
from slimkit.distill.settings import DIST, DISTILL_LOSSES, KD, DistillLoss, Mimic, parse_losses

__all__ = ["DIST", "DISTILL_LOSSES", "KD", "DistillLoss", "Distiller", "Mimic", "parse_losses"]
