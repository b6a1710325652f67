"""Settings of losses that train modules of their own: MGD, FBKD, factor transfer, CRD, BYOT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from slimkit import losses
from slimkit.distill.losses.interface import DISTILL_LOSSES, DistillLoss
from slimkit.distill.losses.modules import (
    EarlyExit,
    Embedding,
    MaskedGenerator,
    Memory,
    NonLocal,
    Paraphraser,
    Translator,
    WithRelation,
)
from slimkit.distill.losses.projection import Shape, build_connector
from slimkit.distill.recording.records import Record, RecordPath
from slimkit.errors import ModelError

__all__ = ["BYOT", "CRD", "FBKD", "MGD", "FactorTransfer"]


class _Trained(DistillLoss):
    """Base of losses that build modules for the shapes they meet."""

    @property
    def needs_shapes(self) -> bool:
        """See the base class."""
        return True


def _maps(shape: Shape, loss: DistillLoss) -> Shape:
    """A shape that must be (N, C, H, W)."""
    if len(shape) != 4:
        raise ModelError(
            f"{loss.type} compares feature maps (N, C, H, W), this record is {shape}",
            where=str(loss.student),
            hint="name a convolutional layer",
        )
    return shape


@DISTILL_LOSSES.register("mgd")
class MGD(_Trained):
    """Masked generation (Yang et al. 2022, arXiv 2205.01529): :func:`slimkit.losses.mimic` of it.

    A random part of the student's map is hidden, and a small generator, trained with it,
    recovers the teacher's whole map from the rest.

    Attributes:
        student: path of the student's layer (required).
        mask: part of the positions that is hidden, 0 … 1.
    """

    type: Literal["mgd"] = "mgd"
    student: RecordPath
    mask: float = Field(default=0.65, ge=0, lt=1)

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        student, teacher = (_maps(shapes[name], self) for name in ("student", "teacher"))
        align = build_connector(student, teacher, where=str(self.student))
        return {"student": MaskedGenerator(align, teacher[1], self.mask)}

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.mimic(student, teacher)


@DISTILL_LOSSES.register("fbkd")
class FBKD(_Trained):
    """Attention and non-local relations of maps (Zhang and Ma 2021); :func:`slimkit.losses.fbkd`.

    Attributes:
        student: path of the student's layer (required).
        mask_weight: of the attention-masked distance.
        attention_weight: of the distance of the attention maps.
        relation_weight: of the distance of the non-local relations.
        temperature: τ > 0 of the masks.
        reduction: the non-local blocks are so many times narrower inside.
        pool: and attend to maps so many times smaller.
    """

    type: Literal["fbkd"] = "fbkd"
    student: RecordPath
    mask_weight: float = Field(default=7e-5, ge=0, le=1e6, allow_inf_nan=False)
    attention_weight: float = Field(default=4e-3, ge=0, le=1e6, allow_inf_nan=False)
    relation_weight: float = Field(default=7e-5, ge=0, le=1e6, allow_inf_nan=False)
    temperature: float = Field(default=0.1, gt=0, le=1e6, allow_inf_nan=False)
    reduction: int = Field(default=2, ge=1, le=65_536)
    pool: int = Field(default=1, ge=1, le=4_096)

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        student, teacher = (_maps(shapes[name], self) for name in ("student", "teacher"))
        align = build_connector(student, teacher, where=str(self.student))
        blocks = [NonLocal(teacher[1], self.reduction, self.pool) for _ in range(2)]
        return {
            "student": WithRelation(align, blocks[0]),
            "teacher": WithRelation(None, blocks[1]),
        }

    def compute(self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        """See the base class; features and relations of both."""
        return losses.fbkd(
            student[0], teacher[0], student[1], teacher[1],
            self.mask_weight, self.attention_weight, self.relation_weight, self.temperature,
        )  # fmt: skip


@DISTILL_LOSSES.register("factor_transfer")
class FactorTransfer(_Trained):
    """Paraphrased features (Kim et al. 2018); see :func:`slimkit.losses.factor_transfer`.

    The paraphraser learns the teacher's factors by reconstruction, at the same time as the
    translator and the student learn to copy them; the student's loss does not reach it.

    Attributes:
        student: path of the student's layer (required).
        factors: channels of the factor, as a fraction of the teacher's.
        reconstruction: weight of the paraphraser's own loss.
    """

    type: Literal["factor_transfer"] = "factor_transfer"
    student: RecordPath
    factors: float = Field(default=0.5, gt=0, le=1e6, allow_inf_nan=False)
    reconstruction: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        student, teacher = (_maps(shapes[name], self) for name in ("student", "teacher"))
        factors = max(1, round(self.factors * teacher[1]))
        return {
            "student": Translator(student[1], factors, (teacher[2], teacher[3])),
            "teacher": Paraphraser(teacher[1], factors),
        }

    def compute(self, student: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
        """See the base class; the teacher's factor and the error of its reconstruction."""
        factor, error = teacher
        return losses.factor_transfer(student, factor) + self.reconstruction * error


@DISTILL_LOSSES.register("crd")
class CRD(_Trained):
    """Contrast with a memory of all samples (Tian et al. 2020); see :func:`slimkit.losses.crd`.

    Attributes:
        student: path of the layer, None for the output; commonly what goes into the classifier:
            ``{module: fc, part: input}``.
        samples: training samples (required); the loop must tell the ids of those in a batch.
        negatives: other samples that each is told from, drawn anew in every step.
        size: of the embeddings.
        temperature: τ > 0.
        momentum: part of a remembered embedding that stays, 0 … 1.
    """

    modules: ClassVar[tuple[str, ...]] = ("memory",)
    type: Literal["crd"] = "crd"
    samples: int = Field(ge=1, le=100_000_000)
    negatives: int = Field(default=16384, ge=1, le=1_000_000)
    size: int = Field(default=128, ge=1, le=65_536)
    temperature: float = Field(default=0.07, gt=0, le=1e6, allow_inf_nan=False)
    momentum: float = Field(default=0.5, ge=0, le=1)

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        return {
            "student": Embedding(math.prod(shapes["student"][1:]), self.size),
            "teacher": Embedding(math.prod(shapes["teacher"][1:]), self.size),
            "memory": Memory(
                self.samples, self.size, self.negatives, self.temperature, self.momentum
            ),
        }

    def compute(self, student: Tensor, teacher: Tensor, ids: Tensor, memory: nn.Module) -> Tensor:
        """See the base class."""
        ours, theirs = memory(student, teacher, ids)
        return losses.crd(ours, self.samples) + losses.crd(theirs, self.samples)


@DISTILL_LOSSES.register("byot")
class BYOT(_Trained):
    """The deepest layers teach classifiers on inner ones (Zhang et al. 2019, arXiv 1905.08094).

    A small classifier on an inner layer of the student learns from the labels, from the
    student's own output and from its deepest features; no teacher is needed (``teacher: self``):

        ``(1 − α) · CE(exit, labels) + α · KL(output ‖ exit) + λ · mean (F_exit − F_deep)²``

    Attributes:
        student: path or pattern of the inner layers (required).
        student_deep: the student's deepest features, commonly ``{module: fc, part: input}``.
        alpha: weight of the output against the labels, 0 … 1.
        temperature: τ > 0 of the output.
        feature_weight: λ ≥ 0.
    """

    type: Literal["byot"] = "byot"
    student: RecordPath
    student_deep: RecordPath
    reduce: Literal["mean", "sum"] = "sum"
    alpha: float = Field(default=0.3, ge=0, le=1)
    temperature: float = Field(default=3.0, gt=0, le=1e6, allow_inf_nan=False)
    feature_weight: float = Field(default=0.03, ge=0, le=1e6, allow_inf_nan=False)

    @property
    def teacher_layer(self) -> str | Record | None:
        """The student's own output, unless something else is named."""
        return self.teacher if self.teacher is not None else Record(of="student")

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """See the base class."""
        channels = _maps(shapes["student"], self)[1]
        width = shapes["student_deep"][1]
        return {"student": EarlyExit(channels, width, shapes["teacher"][1])}

    def compute(
        self,
        student: tuple[Tensor, Tensor],
        teacher: Tensor,
        student_deep: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """See the base class; features and logits of the exit."""
        features, logits = student
        deep = student_deep.detach()
        deep = deep.flatten(2).mean(2) if deep.dim() > 2 else deep
        hard = (1 - self.alpha) * F.cross_entropy(logits, labels)
        soft = self.alpha * losses.kd(logits, teacher, self.temperature)
        return hard + soft + self.feature_weight * losses.mimic(features, deep)
