"""``type: train``: baseline training, recovery after pruning, and distillation."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimkit.artifact import read_json, write_json
from slimkit.distill.settings import DistillLoss
from slimkit.errors import InputError
from slimkit.recipe.fields import TypedBy, wrong
from slimkit.recipe.places import at
from slimkit.recipe.stages import UNPRUNED, Stage, StageContext, StageResult
from slimkit.registry import Registry
from slimkit.train.callbacks import Callback, EpochContext, StepContext
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimkit.distill import Distiller
    from slimkit.train.training import History

__all__ = [
    "SPARSITY",
    "BatchNormL1Term",
    "DistillOptions",
    "GroupLassoTerm",
    "SparsityTerm",
    "TrainStage",
    "distilling",
    "train_model",
    "training_facts",
]

Term = Callable[[StepContext], "Tensor"]

SPARSITY: Registry[type[SparsityTerm]] = Registry("sparsity term")
"""Name in a recipe → settings of a term of the loss that makes channels fall before pruning."""


class SparsityTerm(BaseModel):
    """Base of all terms: which, and how much it counts.

    Attributes:
        weight: of the term beside the loss.
        ignore: patterns of layers whose channels are left alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str
    weight: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    ignore: tuple[str, ...] = ()

    @abstractmethod
    def term(self, model: nn.Module, example_inputs: Tensor) -> Any:
        """A callable from a training step to a scalar, with ``sparsity()`` to report."""


@SPARSITY.register("group_lasso")
class GroupLassoTerm(SparsityTerm):
    """The norms of all weights of each channel; see :class:`slimkit.prune.sparse_training`.

    Attributes:
        growth: push channels that are small already up to ``2**growth`` times harder.
        attention: as in the ``prune`` stage behind.
    """

    type: Literal["group_lasso"] = "group_lasso"
    growth: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    attention: Literal["heads", "channels"] | None = None

    def term(self, model: nn.Module, example_inputs: Tensor) -> Any:
        """See the base class."""
        from slimkit.prune.sparse_training import GroupLasso

        return GroupLasso(
            model,
            example_inputs,
            self.weight,
            growth=self.growth,
            ignore=self.ignore,
            attention=self.attention,
        )


@SPARSITY.register("batch_norm_l1")
class BatchNormL1Term(SparsityTerm):
    """The magnitudes of the batch-norm scales (Liu et al. 2017, "Network Slimming")."""

    type: Literal["batch_norm_l1"] = "batch_norm_l1"

    def term(self, model: nn.Module, example_inputs: Tensor) -> Any:
        """See the base class."""
        from slimkit.prune.sparse_training import BatchNormL1

        return BatchNormL1(model, example_inputs, self.weight, ignore=self.ignore)


class DistillOptions(BaseModel):
    """What a stage that trains may say about a teacher.

    Attributes:
        teacher: a name under ``teachers:``, or of a stage, whose result then teaches; or
            ``unpruned``: the network that the first ``prune`` stage of the chain began with.
        distill: losses between student and teacher, added to the task's own loss (on the
            labels), which ``loss_weight`` scales. For ``unpruned`` the default is
            ``[{type: kd}]``.
        teacher_precision: how the teacher runs; ``"auto"`` takes bf16 where it is fast and agrees.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str | None = None
    distill: tuple[Annotated[DistillLoss, TypedBy("slimkit.distill:DISTILL_LOSSES")], ...] = ()
    teacher_precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _unpruned_teaches_by_its_outputs(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("teacher") == UNPRUNED and "distill" not in data:
            return {**data, "distill": [{"type": "kd"}]}
        return data

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

    Attributes:
        sparsity: a term of the loss that makes channels fall, for a ``prune`` stage behind.
    """

    version: ClassVar[int] = 1
    sees_eval_batches: ClassVar[bool] = False
    type: Literal["train"] = "train"
    sparsity: Annotated[
        SparsityTerm | None, TypedBy("slimkit.recipe.training_stage:SPARSITY", optional=True)
    ] = None

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        if self.sparsity is None:
            history = train_model(model, self, self, context)
            return StageResult(model, training_facts(history))
        with at("sparsity"):
            term = self.sparsity.term(model, context.example_inputs)
        history = train_model(model, self, self, context, terms=[term])
        return StageResult(model, {**training_facts(history), "sparsity": term.sparsity()})

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks that teacher and student fit."""
        if self.sparsity is not None:
            with at("sparsity"):
                self.sparsity.term(model, context.example_inputs)
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
    terms: Sequence[Term] = (),
) -> History:
    """Train ``model`` in place on the training split, with the stage's teacher if it has one.

    The validation split, if there is one, is evaluated along the way; the test split never is.

    Args:
        model: what is trained.
        settings: how.
        options: teacher and distillation losses.
        context: of the stage.
        student: the part of ``model`` whose layers the losses name; by default all of it.
        terms: of the loss, beside the task's and the distiller's.
    """
    from slimkit.train import fit

    plain = TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})
    task, splits = context.task, context.splits
    validation = splits.validation

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        return task.evaluate(candidate, validation) if validation is not None else {}

    with contextlib.ExitStack() as stack:
        losses: list[Term] = [*terms]
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

    def needs(self, argument: str) -> bool:
        return self.distiller.needs(argument)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.distiller.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.distiller.load_state_dict(state)
