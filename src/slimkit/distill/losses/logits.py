"""Settings of losses on logits: KD, soft cross-entropy, DKD, WSLD, DIST."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from slimkit import losses
from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss

__all__ = ["DIST", "DKD", "KD", "WSLD", "SoftCrossEntropy"]


@DISTILL_LOSSES.register("kd")
class KD(DistillLoss):
    """Softened class scores (Hinton et al. 2015); see :func:`slimkit.losses.kd`.

    Attributes:
        temperature: τ > 0.
        standardize: scores of mean 0 and standard deviation 1 over the classes first (Sun et
            al. 2024).
    """

    type: Literal["kd"] = "kd"
    temperature: float = Field(default=4.0, gt=0, le=1e6, allow_inf_nan=False)
    standardize: bool = False

    def compute(
        self, student: Tensor, teacher: Tensor, sample_weights: Tensor | None = None
    ) -> Tensor:
        """See the base class."""
        return losses.kd(student, teacher, self.temperature, self.standardize, sample_weights)


@DISTILL_LOSSES.register("soft_cross_entropy")
class SoftCrossEntropy(DistillLoss):
    """Cross-entropy with the teacher's probabilities; :func:`slimkit.losses.soft_cross_entropy`.

    Attributes:
        temperature: τ > 0.
    """

    type: Literal["soft_cross_entropy"] = "soft_cross_entropy"
    temperature: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(
        self, student: Tensor, teacher: Tensor, sample_weights: Tensor | None = None
    ) -> Tensor:
        """See the base class."""
        return losses.soft_cross_entropy(student, teacher, self.temperature, sample_weights)


@DISTILL_LOSSES.register("dkd")
class DKD(DistillLoss):
    """The label's class and the others apart (Zhao et al. 2022); see :func:`slimkit.losses.dkd`.

    Attributes:
        alpha: weight ≥ 0 of the term on the label's class.
        beta: weight ≥ 0 of the term on the other classes.
        temperature: τ > 0.
    """

    type: Literal["dkd"] = "dkd"
    alpha: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    beta: float = Field(default=8.0, ge=0, le=1e6, allow_inf_nan=False)
    temperature: float = Field(default=4.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """See the base class."""
        return losses.dkd(student, teacher, labels, self.alpha, self.beta, self.temperature)


@DISTILL_LOSSES.register("wsld")
class WSLD(DistillLoss):
    """Soft labels weighted by need (Zhou et al. 2021); see :func:`slimkit.losses.wsld`.

    Attributes:
        temperature: τ > 0.
    """

    type: Literal["wsld"] = "wsld"
    temperature: float = Field(default=2.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """See the base class."""
        return losses.wsld(student, teacher, labels, self.temperature)


@DISTILL_LOSSES.register("dist")
class DIST(DistillLoss):
    """Correlations between and within classes (Huang et al. 2022); see :func:`slimkit.losses.dist`.

    Attributes:
        beta: weight ≥ 0 of the inter-class term.
        gamma: weight ≥ 0 of the intra-class term.
        temperature: τ > 0.
    """

    type: Literal["dist"] = "dist"
    beta: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    gamma: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, le=1e6, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.dist(student, teacher, self.beta, self.gamma, self.temperature)
