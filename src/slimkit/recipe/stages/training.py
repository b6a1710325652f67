"""``type: train``: baseline training, recovery after pruning, and distillation."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimkit.recipe.schema.fields import TypedBy
from slimkit.recipe.schema.places import at
from slimkit.recipe.stages.interface import Stage, StageContext, StageResult
from slimkit.recipe.stages.teachers import (
    TEACHING,
    DistillOptions,
    check_distillation,
    distilling,
    generated_batches,
    with_losses,
)
from slimkit.registry import Registry
from slimkit.train.callbacks import Callback, EpochContext
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from slimkit.inputs import ExampleInputs
    from slimkit.train.stepping import Term
    from slimkit.train.training import History

__all__ = [
    "SPARSITY",
    "BatchNormL1Term",
    "GroupLassoTerm",
    "SparsityTerm",
    "TrainStage",
    "train_model",
    "training_facts",
]


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
    weight: float = Field(default=1e-4, ge=0, le=1e6, allow_inf_nan=False)
    ignore: tuple[str, ...] = ()

    @abstractmethod
    def term(self, model: nn.Module, example_inputs: ExampleInputs) -> Any:
        """A callable from a training step to a scalar, with ``sparsity()`` to report."""


@SPARSITY.register("group_lasso")
class GroupLassoTerm(SparsityTerm):
    """The norms of all weights of each channel; see :class:`slimkit.prune.sparse_training`.

    Attributes:
        growth: push channels that are small already up to ``2**growth`` times harder.
        attention: as in the ``prune`` stage behind.
    """

    type: Literal["group_lasso"] = "group_lasso"
    growth: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    attention: Literal["heads", "channels"] | None = None

    def term(self, model: nn.Module, example_inputs: ExampleInputs) -> Any:
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

    def term(self, model: nn.Module, example_inputs: ExampleInputs) -> Any:
        """See the base class."""
        from slimkit.prune.sparse_training import BatchNormL1

        return BatchNormL1(model, example_inputs, self.weight, ignore=self.ignore)


class TrainStage(DistillOptions, TrainSettings, Stage):
    """Train the model; with ``teacher`` and ``distill``, learn from another network too.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage.

    Attributes:
        sparsity: a term of the loss that makes channels fall, for a ``prune`` stage behind.
    """

    version: ClassVar[int] = 1
    sees_eval_batches: ClassVar[bool] = False
    exclusive: ClassVar = TEACHING
    type: Literal["train"] = "train"
    sparsity: Annotated[
        SparsityTerm | None, TypedBy("slimkit.recipe.stages.training:SPARSITY", optional=True)
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
        context.task.tuned(self)
        check_distillation(model, self, context)
        return model

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
    callbacks: Sequence[Callback] = (),
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
        callbacks: of the stage. Zeros that an earlier stage made stay zero without one.
    """
    from slimkit.train import fit

    plain = TrainSettings(**{name: getattr(settings, name) for name in TrainSettings.model_fields})
    options = with_losses(options, student or model, context.task)
    task, splits = context.task.tuned(plain), context.splits
    validation = splits.validation
    loader: Any = splits.train
    taking_part: list[Callback] = [*callbacks, *_held_zeros(model), _Reporter(context)]
    if options.data_free is not None:
        loader = generated_batches(student or model, options.data_free, context)
        taking_part.append(loader)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        return task.evaluate(candidate, validation) if validation is not None else {}

    with contextlib.ExitStack() as stack:
        losses: list[Term] = [*terms]
        if options.distill:
            distiller = distilling(student or model, options, replace(context, task=task), plain)
            losses.append(stack.enter_context(distiller))
        return fit(
            model,
            loader,
            batch_loss=task.loss,
            settings=plain,
            evaluate=evaluate if validation is not None else None,
            losses=losses,
            callbacks=taking_part,
            checkpoint=context.work / "training.safetensors" if context.work else None,
            seed=context.seed,
            max_steps=context.max_steps,
            progress=context.progress,
            label=context.name,
            tensorboard=context.log_dir,
        )


def training_facts(history: History) -> dict[str, Any]:
    """What the report says about a training."""
    facts: dict[str, Any] = {
        "history": history.epochs,
        "final": history.final,
        "precision": history.precision,
        "steps": history.steps,
    }
    return {**facts, "budget": history.budget} if history.budget else facts


def _held_zeros(model: nn.Module) -> list[Callback]:
    """What keeps the zeros of a network that was made sparse before; nothing for others."""
    from slimkit.plan import applied_plans
    from slimkit.sparsify import HoldZeros, MaskPlan

    sparse = any(isinstance(plan, MaskPlan) for plan in applied_plans(model))
    return [HoldZeros(model)] if sparse else []


class _Reporter(Callback):
    """Tells the log about every epoch."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_epoch_end(self, context: EpochContext) -> None:
        self.context.emit({"event": "epoch", "epoch": context.epoch, **context.record})
