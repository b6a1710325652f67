"""Settings of losses on relations: RKD between samples, FSP between layers, attention transfer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from slimkit import losses
from slimkit.distill.losses.connectors import ConnectorChoice, ConnectorField, connect
from slimkit.distill.losses.features import FeatureLoss
from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss
from slimkit.distill.losses.projection import Shape
from slimkit.distill.recording.records import RecordPath

__all__ = ["FSP", "AttentionTransfer", "RKDAngle", "RKDDistance"]


class _Relations(DistillLoss):
    """Base of losses whose embeddings may differ in size."""

    def fits(self, student: Shape, teacher: Shape) -> bool:
        """See the base class."""
        return student[0] == teacher[0]


@DISTILL_LOSSES.register("rkd_distance")
class RKDDistance(_Relations):
    """Distances between samples (Park et al. 2019); see :func:`slimkit.losses.rkd_distance`."""

    type: Literal["rkd_distance"] = "rkd_distance"

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.rkd_distance(student, teacher)


@DISTILL_LOSSES.register("rkd_angle")
class RKDAngle(_Relations):
    """Angles between samples (Park et al. 2019); see :func:`slimkit.losses.rkd_angle`."""

    type: Literal["rkd_angle"] = "rkd_angle"

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.rkd_angle(student, teacher)


@DISTILL_LOSSES.register("attention_transfer")
class AttentionTransfer(FeatureLoss):
    """Where a layer looks (Zagoruyko 2017); see :func:`slimkit.losses.attention_transfer`.

    Attributes:
        connector: widths may differ without one; ``resize`` joins maps of different sizes.
        power: ≥ 1.
    """

    type: Literal["attention_transfer"] = "attention_transfer"
    connector: Annotated[ConnectorChoice, ConnectorField()] = "none"
    power: float = Field(default=2.0, ge=1, le=1e6, allow_inf_nan=False)

    def fits(self, student: Shape, teacher: Shape) -> bool:
        """See the base class."""
        return len(student) == 4 and (student[0], student[2:]) == (teacher[0], teacher[2:])

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.attention_transfer(student, teacher, self.power)


@DISTILL_LOSSES.register("fsp")
class FSP(FeatureLoss):
    """The flow from one layer to a later one (Yim et al. 2017); see :func:`slimkit.losses.fsp`.

    Attributes:
        student_late: path of the student's later layer (required); ``student`` is the earlier one.
        teacher_late: path in the teacher; None for the same as ``student_late``.
    """

    type: Literal["fsp"] = "fsp"
    student_late: RecordPath
    teacher_late: RecordPath | None = None

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        found: dict[str, nn.Module] = {}
        for ours, theirs in (("student", "teacher"), ("student_late", "teacher_late")):
            where = str(getattr(self, ours))
            module = connect(self.connector, shapes[ours], shapes[theirs], where=where)
            if module is not None:
                found[ours] = module
        return found

    def compute(
        self, student: Tensor, teacher: Tensor, student_late: Tensor, teacher_late: Tensor
    ) -> Tensor:
        """See the base class."""
        return losses.fsp(student, teacher, student_late, teacher_late)
