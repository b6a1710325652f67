"""What a stage that trains may say about teachers, and the term of the loss that comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slimkit.artifact import read_json, write_json
from slimkit.distill.data_free import Generation
from slimkit.distill.losses.interface import DistillLoss
from slimkit.distill.recording.delivery import Delivery
from slimkit.errors import InputError, SlimkitError, nearest
from slimkit.inputs import Batch
from slimkit.recipe.schema.fields import TypedBy, wrong
from slimkit.recipe.schema.places import at
from slimkit.recipe.stages.interface import ORIGINAL, SELF, UNPRUNED, StageContext
from slimkit.recipe.stages.knowledge import check_place, knowing, knowledge_facts
from slimkit.train.callbacks import StepContext
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimkit.distill import Distiller, GeneratedBatches, MutualLearning
    from slimkit.distill.knowledge import KnowledgeDistiller
    from slimkit.inputs import Inputs
    from slimkit.tasks.interface import Task

__all__ = [
    "TEACHING",
    "DistillOptions",
    "check_distillation",
    "distilling",
    "generated_batches",
    "with_losses",
]

MergeOption = (
    Literal["mean", "sum", "confidence"]
    | Annotated[
        tuple[Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)], ...], Field(min_length=1)
    ]
)
TeacherWeight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


def _deliveries(value: Any) -> Any:
    """A name alone is delivered from the teacher."""
    if not isinstance(value, list | tuple):
        return value
    return [{"function": entry} if isinstance(entry, str) else entry for entry in value]


TEACHING = (("teacher", "knowledge"),)
"""Who teaches is here or elsewhere."""


class DistillOptions(BaseModel):
    """What a stage that trains may say about a teacher.

    Attributes:
        teacher: a name under ``teachers:``, or of a stage, whose result then teaches; or
            ``unpruned``: the network that the first ``prune`` stage of the chain began with; or
            ``original``: that its first stage began with that prunes or quantizes; or
            ``self``: the student's deeper layers teach the others. A list of names is several
            teachers that count equally, a mapping gives each its weight.
        distill: losses between student and teacher, added to the task's own loss (on the
            labels), which ``loss_weight`` scales. For ``unpruned`` the default is
            ``[{type: kd}]``, for ``original`` what the task says of the network: of a detector
            features, scores and boxes.
        teacher_weighting: ``confidence``: of several teachers, who is surer of the right label
            of a sample counts more on it; ``fixed``: as ``teacher`` says.
        teacher_mode: ``frozen``, or ``mutual``: teachers start as they are, train beside the
            student, and learn from it in turn.
        teacher_precision: how the teacher runs; ``"auto"`` takes bf16 where it is fast and agrees.
        teacher_cache: megabytes for the answers of each frozen teacher, found again by the content
            of each image; only for images that are not augmented.
        deliver: functions whose results the student gets from the teacher, each an import path
            or ``{function: PATH, source: student}``.
        data_free: a generator invents the training images; none of the data's are used.
        knowledge: in place of a teacher in this process, what teachers elsewhere know:
            ``file:DIR``, ``grpc://host:port``, ``grpc+tls://host:port``, any number of them.
        merge: how what several of them say about the same becomes one: ``"mean"``, ``"sum"``,
            ``"confidence"``, one weight for each, or one of these per key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str | tuple[str, ...] | dict[str, TeacherWeight] | None = None
    distill: tuple[Annotated[DistillLoss, TypedBy("slimkit.distill:DISTILL_LOSSES")], ...] = ()
    teacher_weighting: Literal["fixed", "confidence"] = "fixed"
    teacher_mode: Literal["frozen", "mutual"] = "frozen"
    teacher_precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    teacher_cache: float = Field(default=0, ge=0, le=1e6, allow_inf_nan=False)
    deliver: Annotated[tuple[Delivery, ...], BeforeValidator(_deliveries)] = ()
    data_free: Annotated[
        Generation | None, TypedBy("slimkit.distill:GENERATION", optional=True)
    ] = None
    knowledge: tuple[str, ...] = ()
    merge: MergeOption | dict[str, MergeOption] = "mean"

    @model_validator(mode="before")
    @classmethod
    def _unpruned_teaches_by_its_outputs(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("teacher") == UNPRUNED and "distill" not in data:
            return {**data, "distill": [{"type": "kd"}]}
        return data

    @model_validator(mode="after")
    def _teacher_and_losses_go_together(self) -> Self:
        if self.knowledge and self.teacher:
            raise wrong("there are a teacher and knowledge", "leave one out", path="knowledge")
        for number, place in enumerate(self.knowledge):
            check_place(place, f"knowledge.{number}")
        if self.knowledge and not self.distill:
            raise wrong(
                "there is knowledge but no loss", "add distill: [{type: kd}]", path="distill"
            )
        if self.teacher is not None and not self.teacher:
            raise wrong("there is no teacher in it", "write a name", path="teacher")
        if self.teacher and not self.distill and self.teacher != ORIGINAL:
            raise wrong(
                "there is a teacher but no loss", "add distill: [{type: kd}]", path="distill"
            )
        if self.distill and not (self.teacher or self.knowledge):
            raise wrong("there are losses but no teacher", "add teacher: NAME", path="teacher")
        return self

    @model_validator(mode="after")
    def _the_form_fits_the_teachers(self) -> Self:
        names = self.names_of_teachers()
        if SELF in names and len(names) > 1:
            hint = "give a loss {teacher: {module: LAYER, of: student}}"
            raise wrong("self cannot be one of several teachers", hint, path="teacher")
        teachers = 0 if SELF in names else len(names)
        wanted = {
            "teacher_weighting": (self.teacher_weighting == "confidence", teachers > 1, "several"),
            "teacher_mode": (self.teacher_mode == "mutual", teachers > 0, "one or more"),
            "teacher_cache": (self.teacher_cache > 0, teachers > 0, "one or more"),
            "deliver": (bool(self.deliver), teachers == 1, "one"),
            "data_free": (self.data_free is not None, teachers == 1, "one"),
        }
        for key, (chosen, fits, count) in wanted.items():
            if chosen and not fits:
                raise wrong(f"{key} needs teachers: {count}, not {teachers}", path=key)
        weighted = isinstance(self.teacher, dict)
        if weighted and self.teacher_weighting == "confidence":
            hint = f"teacher: [{', '.join(names)}]"
            raise wrong("confidence takes the place of weights", hint, path="teacher_weighting")
        fixed = weighted or self.teacher_weighting == "confidence" or self.teacher_cache > 0
        if self.teacher_mode == "mutual" and (fixed or self.deliver or self.data_free):
            raise wrong(
                "networks that learn from each other count equally, and from data",
                "drop weights, deliver, teacher_cache and data_free",
                path="teacher_mode",
            )
        return self

    @model_validator(mode="after")
    def _names_are_those_of_teachers(self) -> Self:
        names = self.names_of_teachers()
        for number, name in enumerate(names):
            if name in names[:number]:
                raise wrong(f"{name!r} is there twice", path=f"teacher.{number}")
        for index, loss in enumerate(self.distill):
            for number, name in enumerate(loss.teachers):
                if name not in names:
                    path = f"distill.{index}.teachers.{number}"
                    raise wrong(f"there is no teacher {name!r}", nearest(name, names), path=path)
        return self

    def names_of_teachers(self) -> tuple[str, ...]:
        """All names that ``teacher`` has."""
        if self.teacher is None:
            return ()
        return (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)

    def teacher_names(self) -> dict[str, str]:
        """See :class:`Stage`."""
        if isinstance(self.teacher, str):
            return {} if self.teacher == SELF else {self.teacher: "teacher"}
        keys = self.teacher or ()
        numbered = isinstance(keys, tuple)
        return {name: f"teacher.{number if numbered else name}" for number, name in enumerate(keys)}

    def facts(self) -> Mapping[str, Any]:
        """See :class:`Stage`: the key of a teacher stands for its name, but not for its weight."""
        weights = {"teacher_weights": self.teacher} if isinstance(self.teacher, dict) else {}
        return {**weights, **knowledge_facts(self.knowledge)}


def with_losses(options: DistillOptions, model: nn.Module, task: Task) -> DistillOptions:
    """``options`` with what ``teacher: original`` alone stands for.

    Raises:
        InputError: the task has no losses for this network.
    """
    if options.teacher != ORIGINAL or options.distill:
        return options
    from slimkit.distill import parse_losses

    losses = tuple(parse_losses(list(task.distillation(model))))
    if not losses:
        raise InputError(
            f"the task {task.type} does not say what its original teaches {type(model).__name__}",
            where="teacher",
            hint="add distill: with losses",
        )
    return options.model_copy(update={"distill": losses})


def check_distillation(model: nn.Module, options: DistillOptions, context: StageContext) -> None:
    """Make sure that teachers, losses and the student fit, without training.

    Teachers behind an address are not asked: they may be started later.

    Raises:
        SlimkitError: they do not, with the path in the stage.
    """
    options = with_losses(options, model, context.task)
    if options.distill and all(place.startswith("file:") for place in options.knowledge):
        with distilling(model, options, context):
            pass
    if options.data_free is not None:
        generated_batches(model, options.data_free, context)


@contextlib.contextmanager
def distilling(
    model: nn.Module,
    options: DistillOptions,
    context: StageContext,
    settings: TrainSettings | None = None,
) -> Iterator[_Remembering | MutualLearning | KnowledgeDistiller]:
    """The stage's distiller as an extra loss for :func:`slimkit.train.fit`.

    Args:
        model: the student.
        options: teachers and losses.
        context: of the stage.
        settings: of the task's loss, for teachers that learn.
    """
    from slimkit.distill import MutualLearning

    if options.knowledge:
        with knowing(model, options, context) as term:
            yield term
        return
    example_inputs = context.examples(2)
    if options.teacher_mode == "mutual":
        loss_fn = context.task.loss_fn()
        if loss_fn is None:
            raise InputError(
                f"the loss of {context.task.type} is inside the model: "
                "a peer cannot be judged by its outputs",
                where="teacher_mode",
                hint="teacher_mode: frozen",
            )
        with _at_losses(context):
            mutual = MutualLearning(
                model,
                _teachers(options, context),
                options.distill,
                example_inputs=example_inputs,
                task_loss=loss_fn,
                task_weight=settings.loss_weight if settings is not None else 1.0,
            )
        with mutual:
            yield mutual
        return
    note = context.work / "teacher.json" if context.work else None
    with _at_losses(context):
        distiller = _distiller(model, options, context, example_inputs, note)
    with distiller:
        yield _Remembering(distiller, note, context.task)


def _distiller(
    model: nn.Module,
    options: DistillOptions,
    context: StageContext,
    example_inputs: Inputs,
    note: Path | None,
) -> Distiller:
    from slimkit.distill import Distiller

    moving = context.splits.train.augmented or options.data_free is not None
    if options.teacher_cache and moving:
        raise InputError(
            "no sample comes again as it was, so there is nothing to keep",
            where="teacher_cache",
            hint="drop it, or data.augment and data_free",
        )
    precision: Any = options.teacher_precision
    if precision == "auto" and note is not None and note.exists():
        precision = read_json(note)["precision"]
    weights: Any = options.teacher if isinstance(options.teacher, dict) else None
    return Distiller(
        model,
        None if options.teacher == SELF else _teachers(options, context),
        options.distill,
        example_inputs=example_inputs,
        precision=precision,
        teacher_weights="confidence" if options.teacher_weighting == "confidence" else weights,
        deliveries=options.deliver,
        cache_mb=options.teacher_cache,
    )


def _teachers(options: DistillOptions, context: StageContext) -> nn.Module | dict[str, nn.Module]:
    """One alone, or all by name."""
    if context.teacher is None:
        raise InputError("the stage has no teacher", where="teacher")
    single = isinstance(options.teacher, str) and not any(x.teachers for x in options.distill)
    return context.teacher if single or not context.teachers else dict(context.teachers)


@contextlib.contextmanager
def _at_losses(context: StageContext) -> Iterator[None]:
    """``losses.0.student`` of a distiller is ``distill.0.student`` of the stage."""
    try:
        yield
    except SlimkitError as error:
        own = error.where or ""
        keys = {"deliveries": "deliver", "cache_mb": "teacher_cache", "teacher_cache": own}
        if not own.startswith("losses.") and own not in keys:
            with at("distill"):
                raise
        place = keys.get(own, own.replace("losses", "distill", 1))
        where = f"stages.{context.name}.{place}"
        raise type(error)(error.message, where=where, hint=error.hint) from error


def generated_batches(
    student: nn.Module, settings: Generation, context: StageContext
) -> GeneratedBatches:
    """As many batches per epoch as the data has, of images that nobody took."""
    from slimkit.distill import GeneratedBatches

    if context.teacher is None:
        raise InputError("the stage has no teacher", where="teacher")
    train = context.splits.train
    shape = context.splits.facts.get("shape")
    if shape is None or len(shape) != 3:
        raise InputError(
            f"images can be invented for data of one shape only, that of {context.task.type} "
            "has none",
            where="data_free",
        )
    channels, height, width = shape
    with at("data_free"):
        return GeneratedBatches(
            student,
            context.teacher,
            settings,
            shape=(channels, height, width),
            batch_size=train.batch_size,
            steps=len(train),
        )


class _Remembering:
    """A distiller that calls the teacher as the task says, and notes how it decided to run it.

    The decision is measured, so a run that is killed and resumed could come to another one
    and so to other weights than an uninterrupted run.
    """

    def __init__(self, distiller: Distiller, note: Path | None, task: Task) -> None:
        self.distiller = distiller
        self.note = note
        self.task = task

    def __call__(self, step: StepContext) -> Tensor:
        asked = Batch(self.task.teacher_inputs(step.batch), step.batch.targets, step.batch.ids)
        loss = self.distiller(replace(step, batch=asked))
        if self.note is not None:
            several = len(self.distiller.precisions) > 1
            precision = self.distiller.precisions if several else self.distiller.precision
            write_json(self.note, {"precision": precision or "auto"})
            self.note = None
        return loss

    def needs(self, argument: str) -> bool:
        return self.distiller.needs(argument)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.distiller.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.distiller.load_state_dict(state)
