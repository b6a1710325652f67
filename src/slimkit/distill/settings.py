"""What a recipe says about distillation: one frozen settings class per loss, found by name.

A loss of your own is a class with a :meth:`DistillLoss.compute` and one decorator::

    @DISTILL_LOSSES.register("soft_l1")
    class SoftL1(DistillLoss):
        type: Literal["soft_l1"] = "soft_l1"

        def compute(self, student, teacher):
            return F.smooth_l1_loss(student, teacher)

after which ``distill: [{type: soft_l1, weight: 0.5}]`` works in every recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimkit import losses
from slimkit.distill.connecting import build_connector
from slimkit.errors import RecipeError, nearest
from slimkit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DIST", "DISTILL_LOSSES", "KD", "DistillLoss", "Mimic", "parse_losses"]

DISTILL_LOSSES: Registry[type[DistillLoss]] = Registry("distillation loss")
"""Name in a recipe → settings class."""


class DistillLoss(BaseModel, ABC):
    """Base of all distillation losses: what is compared, how, and how much it counts.

    Attributes:
        type: the name in :data:`DISTILL_LOSSES`; subclasses narrow it to a ``Literal``.
        weight: factor ≥ 0 of this loss in the sum.
        student: path of the student's module whose output is compared, such as
            ``"layer3.0.conv2"``; None for the output of the whole network.
        teacher: path in the teacher; None for the same as ``student``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    student: str | None = None
    teacher: str | None = None

    @model_validator(mode="after")
    def _teacher_needs_student(self) -> DistillLoss:
        if self.teacher is not None and self.student is None:
            raise ValueError("a layer of the teacher is given, but none of the student")
        return self

    @property
    def teacher_layer(self) -> str | None:
        """The teacher's module path, None for its output."""
        return self.teacher if self.teacher is not None else self.student

    @property
    def needs_shapes(self) -> bool:
        """Whether :meth:`connect` must see shapes before the first step (to own parameters)."""
        return False

    def connect(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module | None:
        """A module that brings the student's records to the teacher's shape, if one is needed.

        Args:
            student: shape of the student's record, (N, C, …).
            teacher: shape of the teacher's.

        Raises:
            ModelError: no connector joins these shapes.
        """
        return None

    @abstractmethod
    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, unweighted.

        Args:
            student: float32 record with gradient, after the connector if there is one.
            teacher: float32 record without gradient, of the same shape.

        Returns:
            A scalar.
        """


@DISTILL_LOSSES.register("kd")
class KD(DistillLoss):
    """Softened class scores (Hinton et al. 2015); see :func:`slimkit.losses.kd`.

    Attributes:
        temperature: τ > 0.
    """

    type: Literal["kd"] = "kd"
    temperature: float = Field(default=4.0, gt=0, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.kd(student, teacher, self.temperature)


@DISTILL_LOSSES.register("dist")
class DIST(DistillLoss):
    """Correlations between and within classes (Huang et al. 2022); see :func:`slimkit.losses.dist`.

    Attributes:
        beta: weight ≥ 0 of the inter-class term.
        gamma: weight ≥ 0 of the intra-class term.
        temperature: τ > 0.
    """

    type: Literal["dist"] = "dist"
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.dist(student, teacher, self.beta, self.gamma, self.temperature)


@DISTILL_LOSSES.register("mimic")
class Mimic(DistillLoss):
    """Features of a layer, through a 1×1 connector (FitNets); see :func:`slimkit.losses.mimic`.

    Attributes:
        student: path of the student's layer (required).
        connector: ``"auto"`` adds a 1×1 convolution only where the widths differ and resizes
            only where the maps differ; ``"conv1x1"`` always adds one; ``"none"`` adds nothing.
        normalize: compare directions of the channel vectors instead of values.
    """

    type: Literal["mimic"] = "mimic"
    student: str
    connector: Literal["auto", "conv1x1", "none"] = "auto"
    normalize: bool = False

    @property
    def needs_shapes(self) -> bool:
        """See the base class."""
        return self.connector != "none"

    def connect(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module | None:
        """See the base class."""
        if self.connector == "none":
            return None
        return build_connector(
            student, teacher, always=self.connector == "conv1x1", where=self.student
        )

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the base class."""
        return losses.mimic(student, teacher, self.normalize)


def parse_losses(
    entries: Sequence[Mapping[str, Any] | DistillLoss], *, where: str = "distill"
) -> list[DistillLoss]:
    """Read the ``distill:`` list of a recipe.

    Args:
        entries: ``[{"type": "kd", "temperature": 4}, …]``; settings objects pass through.
        where: the list's own path, the beginning of the path in errors.

    Raises:
        RecipeError: wrong key, type or range, with the path such as ``distill.0.temperature``.
        UnknownNameError: no loss of that type, with the nearest names.
    """
    if not isinstance(entries, list | tuple):
        raise RecipeError(
            f"expected a list of losses, got {type(entries).__name__}",
            where=where,
            hint="write distill: [{type: kd}]",
        )
    return [_parse_loss(entry, f"{where}.{index}") for index, entry in enumerate(entries)]


def _parse_loss(entry: object, where: str) -> DistillLoss:
    if isinstance(entry, DistillLoss):
        return entry
    if not isinstance(entry, Mapping):
        raise RecipeError(
            f"expected a mapping with a type, got {entry!r}", where=where, hint="write {type: kd}"
        )
    name = entry.get("type")
    if not isinstance(name, str):
        raise RecipeError(
            "the type of the loss is missing",
            where=f"{where}.type",
            hint=nearest(str(name), DISTILL_LOSSES),
        )
    settings: object = DISTILL_LOSSES.get(name, where=f"{where}.type")
    if not (isinstance(settings, type) and issubclass(settings, DistillLoss)):
        raise RecipeError(f"{name!r} is not a DistillLoss class", where=f"{where}.type")
    values = {key: value for key, value in entry.items() if key != "type"}
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *map(str, first["loc"])])
        message = f"{first['msg']}, got {first['input']!r}"
        hint: str | None = None
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), settings.model_fields)
        elif first["type"] == "missing":
            message = "this setting is required"
        raise RecipeError(message, where=path, hint=hint) from error
