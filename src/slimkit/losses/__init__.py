"""Losses as pure functions: tensors in, one scalar out, no state and no model.

Distillation losses take ``(student, teacher)``. They compute in float32 whatever they are
given, and the gradient flows into the student only.
"""

from __future__ import annotations

from slimkit.losses.correlation import dist
from slimkit.losses.feature import mimic
from slimkit.losses.logits import kd

__all__ = ["dist", "kd", "mimic"]
