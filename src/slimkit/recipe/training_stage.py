"""``type: train``: baseline training, recovery after pruning, and distillation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from slimkit.artifact import read_json, write_json
from slimkit.distill.settings import DistillLoss
from slimkit.errors import InputError
from slimkit.recipe.fields import TypedBy, wrong
from slimkit.recipe.places import at
from slimkit.recipe.stages import Stage, StageContext, StageResult
from slimkit.train.callbacks import Callback, EpochContext, StepContext
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimkit.distill import Distiller
    from slimkit.train.training import History

__all__ = ["DistillOptions", "TrainStage", "distilling", "train_model", "training_facts"]


class DistillOptions(BaseModel):
    """What a stage that trains may say about a teacher.

    Attributes:
        teacher: a name under ``teachers:``, or of a stage, whose result then teaches.
        distill: losses between student and teacher, added to the task's own loss (on the
            labels), which ``loss_weight`` scales.
        teacher_precision: how the teacher runs; ``"auto"`` takes bf16 where it is fast and agrees.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str | None = None
    distill: tuple[Annotated[DistillLoss, TypedBy("slimkit.distill:DISTILL_LOSSES")], ...] = ()
    teacher_precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"

    @model_validator(mode="after")
    def _teacher_and_losses_go_together(self) -> Self:
        if self.teacher and not self.distill:
            raise wrong(
                "there is a teacher but no loss", "add distill: [{type: kd}]", path="distill"
            )
        if self.distill and not self.teacher:
            raise wrong("there are losses but no teacher", "add teacher: NAME", path="teacher")
        return self


class TrainStage(DistillOptions, TrainSettings, Stage):
    """Train the model; with ``teacher`` and ``distill``, learn from another network too.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage.
    """

    version: ClassVar[int] = 1
    sees_eval_batches: ClassVar[bool] = False
    type: Literal["train"] = "train"

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        history = train_model(model, self, self, context)
        return StageResult(model, training_facts(history))

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks that teacher and student fit."""
        if context.teacher is not None:
            with distilling(model, self, context):
                pass
        return model

    def teacher_name(self) -> str | None:
        """See the base class."""
        return self.teacher

    def training_epochs(self) -> float:
        """See the base class."""
        return float(self.epochs)


def train_model(
    model: nn.Module,
    settings: TrainSettings,
    options: DistillOptions,
    context: StageContext,
    *,
    student: nn.Module | None = None,
) -> History:
    """Train ``model`` in place on the training split, with the stage's teacher if it has one.

    The validation split, if there is one, is evaluated along the way; the test split never is.

    Args:
        model: what is trained.
        settings: how.
        options: teacher and distillation losses.
        context: of the stage.
        student: the part of ``model`` whose layers the losses name; by default all of it.
    """
    from slimkit.train import fit

    plain = TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})
    task, splits = context.task, context.splits
    validation = splits.validation

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        return task.evaluate(candidate, validation) if validation is not None else {}

    with contextlib.ExitStack() as stack:
        losses: list[Callable[[StepContext], Tensor]] = []
        if context.teacher is not None:
            losses.append(stack.enter_context(distilling(student or model, options, context)))
        return fit(
            model,
            splits.train,
            loss_fn=task.loss_fn(plain.label_smoothing),
            settings=plain,
            evaluate=evaluate if validation is not None else None,
            losses=losses,
            callbacks=[_Reporter(context)],
            checkpoint=context.work / "training.safetensors" if context.work else None,
            seed=context.seed,
            max_steps=context.max_steps,
            progress=context.progress,
            label=context.name,
            tensorboard=context.log_dir,
        )


def training_facts(history: History) -> dict[str, Any]:
    """What the report says about a training."""
    return {
        "history": history.epochs,
        "final": history.final,
        "precision": history.precision,
        "steps": history.steps,
    }


@contextlib.contextmanager
def distilling(
    model: nn.Module, options: DistillOptions, context: StageContext
) -> Iterator[_Remembering]:
    """The stage's distiller as an extra loss for :func:`slimkit.train.fit`."""
    from slimkit.distill import Distiller

    if context.teacher is None:
        raise InputError("the stage has no teacher", where="teacher")
    note = context.work / "teacher.json" if context.work else None
    precision = options.teacher_precision
    if precision == "auto" and note is not None and note.exists():
        precision = read_json(note)["precision"]
    with at("distill"):
        distiller = Distiller(
            model,
            context.teacher,
            options.distill,
            example_inputs=context.example_inputs.repeat(2, 1, 1, 1),
            precision=precision,
        )
    with distiller:
        yield _Remembering(distiller, note)


class _Reporter(Callback):
    """Tells the log about every epoch."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_epoch_end(self, context: EpochContext) -> None:
        self.context.emit({"event": "epoch", "epoch": context.epoch, **context.record})


class _Remembering:
    """A distiller that notes how it decided to run the teacher.

    The decision is measured, so a run that is killed and resumed could come to another one
    and so to other weights than an uninterrupted run.
    """

    def __init__(self, distiller: Distiller, note: Path | None) -> None:
        self.distiller = distiller
        self.note = note

    def __call__(self, step: StepContext) -> Tensor:
        loss = self.distiller(step)
        if self.note is not None:
            write_json(self.note, {"precision": self.distiller.precision})
            self.note = None
        return loss

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.distiller.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.distiller.load_state_dict(state)
