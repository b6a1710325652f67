"""Settings of losses on the dense outputs of detectors: scores of cells, and where boxes lie."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss
from slimkit.distill.recording.records import RecordPath
from slimkit.losses.detection import localization_distillation, quality_distillation

__all__ = ["LocalizationKD", "QualityKD"]


@DISTILL_LOSSES.register("quality_kd")
class QualityKD(DistillLoss):
    """Class scores of every cell; see :func:`slimkit.losses.detection.quality_distillation`.

    Attributes:
        student: record of the logits, (N, cells, classes).
        beta: exponent ≥ 0 of the difference that weighs a score.
    """

    type: Literal["quality_kd"] = "quality_kd"
    student: RecordPath
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return quality_distillation(student, teacher, self.beta)


@DISTILL_LOSSES.register("localization_kd")
class LocalizationKD(DistillLoss):
    """Where boxes lie; see :func:`slimkit.losses.detection.localization_distillation`.

    Attributes:
        student: record of the sides, (N, cells, 4 · bins).
        teacher_scores: the teacher's record of the logits, (N, cells, classes).
        bins: distances per side; 1 where a side is one number.
        temperature: τ > 0 of distributions.
    """

    type: Literal["localization_kd"] = "localization_kd"
    student: RecordPath
    teacher_scores: RecordPath
    bins: int = Field(default=8, ge=1)
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor, teacher_scores: Tensor) -> Tensor:
        """See the base class."""
        return localization_distillation(
            student, teacher, teacher_scores, bins=self.bins, temperature=self.temperature
        )
