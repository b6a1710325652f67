"""The interface of distillation losses: typed settings, and a signature that says what it needs.

A loss of your own is a class with a :meth:`DistillLoss.compute` and one decorator::

    @DISTILL_LOSSES.register("soft_l1")
    class SoftL1(DistillLoss):
        type: Literal["soft_l1"] = "soft_l1"

        def compute(self, student, teacher):
            return F.smooth_l1_loss(student, teacher)

after which ``distill: [{type: soft_l1, weight: 0.5}]`` works in every recipe. What else
``compute`` names, it gets: see :class:`DistillLoss`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimkit.distill.losses.projection import Shape
from slimkit.distill.losses.schedules import WeightSchedule, WeightScheduleField
from slimkit.distill.recording.records import Record, RecordPath
from slimkit.doors import door
from slimkit.errors import InputError, RecipeError, nearest
from slimkit.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["DISTILL_LOSSES", "DistillLoss", "parse_losses", "unique_names"]

DISTILL_LOSSES: Registry[type[DistillLoss]] = Registry("distillation loss")
"""Name in a recipe → settings class."""


@door
class DistillLoss(BaseModel, ABC):
    """Base of all distillation losses: what is compared, how, and how much it counts.

    A loss says what it compares by the arguments of its ``compute``, each by name:

    - ``student``, ``teacher``: the two records, float32, (N, …); the teacher's is without
      gradient;
    - ``student_NAME``, ``teacher_NAME``: further records, named by fields of the same names
      (of type ``RecordPath``; a teacher's field may be None for the student's path);
    - ``labels``: class numbers (N,); ``ids``: numbers of the samples (N,), the same in every
      epoch; ``inputs``: what the networks were called with;
    - ``sample_weights``: (N,), how much each sample counts when several teachers are weighted
      by their confidence, None otherwise;
    - what :attr:`modules` names: a trained module of the loss's own, from :meth:`parts`.

    An argument with a default stays at it when there is nothing to pass.

    Attributes:
        type: the name in :data:`DISTILL_LOSSES`; subclasses narrow it to a ``Literal``.
        weight: factor ≥ 0 of this loss in the sum.
        student: path of the student's module whose output is compared, such as
            ``"layer3.0.conv2"``, a pattern such as ``"layer*"``, or another :class:`Record`;
            None for the output of the whole network. Several matches are compared one by one
            with the teacher's, in order, and ``reduce`` joins their losses.
        teacher: the same in the teacher; None for the same as ``student``.
        reduce: ``mean`` or ``sum`` over the pairs of a pattern.
        schedule: how the weight changes over the run.
        teachers: names of the teachers it learns from, where there are several; empty for all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    modules: ClassVar[tuple[str, ...]] = ()

    type: str
    weight: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    student: RecordPath | None = None
    teacher: RecordPath | None = None
    reduce: Literal["mean", "sum"] = "mean"
    schedule: WeightScheduleField = WeightSchedule()
    teachers: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _teacher_needs_student(self) -> DistillLoss:
        own = isinstance(self.teacher, Record) and self.teacher.of == "student"
        if self.teacher is not None and self.student is None and not own:
            raise ValueError("a layer of the teacher is given, but none of the student")
        return self

    @property
    def teacher_layer(self) -> str | Record | None:
        """What is recorded of the teacher, None for its output."""
        return self.teacher if self.teacher is not None else self.student

    @property
    def needs_shapes(self) -> bool:
        """Whether :meth:`parts` must see shapes before the first step (to own parameters)."""
        return False

    def connect(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """A module that brings the student's records to the teacher's shape, if one is needed.

        Args:
            student: shape of the student's record, (N, C, …).
            teacher: shape of the teacher's.

        Raises:
            ModelError: no connector joins these shapes.
        """
        return None

    def parts(
        self, shapes: Mapping[str, Shape], layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """All modules that the loss trains, by the argument of ``compute`` they are for.

        A record goes through the module of its name first; a name in :attr:`modules` is the
        argument itself. By default, what :meth:`connect` returns is for ``student``.

        Args:
            shapes: argument → shape of its record.
            layers: argument → recorded module, where the record is one.

        Raises:
            ModelError: no connector joins these shapes.
        """
        connector = self.connect(shapes["student"], shapes["teacher"])
        return {} if connector is None else {"student": connector}

    def fits(self, student: Shape, teacher: Shape) -> bool:
        """Whether records of these shapes, after the connectors, can be compared."""
        return student == teacher

    def factor_at(self, epoch: int | None, progress: float | None, index: int = 0) -> float:
        """What the schedule says now.

        Args:
            epoch: from 0.
            progress: part of the run that is over, 0 … 1.
            index: the loss's place among others, for the error.

        Raises:
            InputError: the schedule moves and the time is not known.
        """
        if not self.schedule.moves:
            return 1.0
        if epoch is None or progress is None:
            raise InputError(
                f"the weight of {self.type!r} follows a schedule",
                where=f"losses.{index}.schedule",
                hint="pass epoch= and progress= with the batch",
            )
        return self.schedule.factor(epoch, progress)

    def check_shapes_known(self) -> None:
        """For a loss that is used without example inputs.

        Raises:
            InputError: it cannot be.
        """
        if self.needs_shapes:
            on = f" on {str(self.student)!r}" if self.student is not None else ""
            raise InputError(
                f"the loss {self.type!r}{on} needs them to build its connector",
                where="example_inputs",
                hint="pass a small batch, or connector='none' where the shapes agree",
            )

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, unweighted, a scalar; every loss names the arguments that it needs."""


def unique_names(losses: Iterable[DistillLoss]) -> list[str]:
    """What reports call each loss: ``kd``, ``mimic:layer3``, and ``kd#2`` for a second one."""
    names: list[str] = []
    for loss in losses:
        base = loss.type if loss.student is None else f"{loss.type}:{loss.student}"
        number = sum(name.split("#")[0] == base for name in names)
        names.append(f"{base}#{number + 1}" if number else base)
    return names


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
        raise _explained(error, settings, where) from error


def _explained(error: ValidationError, settings: type[BaseModel], where: str) -> RecipeError:
    """The first of pydantic's complaints, in words of the recipe."""
    first = error.errors()[0]
    context = first.get("ctx", {})
    place = [*map(str, first["loc"]), *([context["path"]] if context.get("path") else [])]
    path = ".".join([where, *place])
    if first["type"] == "slimkit":
        return RecipeError(context["message"], where=path, hint=context["hint"] or None)
    message = f"{first['msg']}, got {first['input']!r}"
    hint: str | None = None
    if first["type"] == "extra_forbidden":
        known = settings.model_fields if len(place) == 1 else ()
        hint = nearest(place[-1], known) if known else None
    elif first["type"] == "missing":
        message = "this setting is required"
    return RecipeError(message, where=path, hint=hint)
