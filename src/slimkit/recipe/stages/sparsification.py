"""``type: sparsify``: weights become zero, during training or before it, and stay zero."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from slimkit.recipe.schema.fields import wrong
from slimkit.recipe.stages.interface import Stage, StageContext, StageResult
from slimkit.recipe.stages.teachers import DistillOptions, check_distillation
from slimkit.recipe.stages.training import train_model, training_facts
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from slimkit.sparsify import GradualPruner
    from slimkit.sparsify.patterns import SparsityPattern

__all__ = ["SparsifyStage"]

_RESOLUTION = 100_000
"""Steps of a stage's schedule, which is stretched to the training: its phases are fractions."""
_PATTERN = re.compile(r"(\d{1,4})([:x])(\d{1,4})")


class SparsifyStage(DistillOptions, TrainSettings, Stage):
    """Train the network while ever more of its smallest weights become zero.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage, and a teacher
    can be named as in ``type: train``: ``unpruned`` is the network that the stage begins with.

    Attributes:
        sparsity: fraction of zeros at the end, in the layers that take part.
        method: ``gradual`` magnitude pruning (Zhu & Gupta 2017), or ``one-shot`` before training.
        stable: part of the training before the first zero; 0 for a trained network.
        pruning: part of the training in which it becomes sparse; the rest tunes what is left.
        updates: how often masks are renewed while it becomes sparse.
        initial: sparsity of the first masks.
        scope: every ``layer`` has this sparsity, or all of them together (``global``).
        only: ``conv1x1`` for 1×1 convolutions alone, or patterns of modules.
        skip: patterns of modules that stay dense.
        pattern: ``"2:4"`` for N:M along the input channels, ``"2x1"`` for blocks of two outputs by
            one input; single weights by default.
    """

    version: ClassVar[int] = 1
    sees_eval_batches: ClassVar[bool] = False
    type: Literal["sparsify"] = "sparsify"
    sparsity: Annotated[float, Field(gt=0, lt=1)]
    method: Literal["gradual", "one-shot"] = "gradual"
    stable: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pruning: Annotated[float, Field(gt=0, le=1)] = 0.5
    updates: Annotated[int, Field(ge=1, le=100_000)] = 100
    initial: Annotated[float, Field(ge=0, lt=1)] = 0.15
    scope: Literal["layer", "global"] = "layer"
    only: Literal["conv1x1"] | tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    pattern: str | None = None

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.stable + self.pruning > 1:
            raise wrong(
                f"stable {self.stable:g} and pruning {self.pruning:g} are longer than the training",
                "stable: 0, pruning: 0.5",
                path="pruning",
            )
        if self.method == "gradual" and self.initial >= self.sparsity:
            raise wrong(
                f"it begins with a sparsity of {self.initial:g} and shall end with "
                f"{self.sparsity:g}",
                "initial: 0",
                path="initial",
            )
        self.chosen_pattern()
        return self

    def chosen_pattern(self) -> SparsityPattern | None:
        """The pattern as a value."""
        from slimkit.errors import InputError
        from slimkit.sparsify.patterns import Block, NofM

        if self.pattern is None:
            return None
        found = _PATTERN.fullmatch(self.pattern)
        if found is None:
            raise wrong(f"no pattern: {self.pattern!r}", '"2:4" or "2x1"', path="pattern")
        first, kind, second = int(found[1]), found[2], int(found[3])
        try:
            pattern = NofM(first, second) if kind == ":" else Block(first, second)
        except InputError as error:
            raise wrong(error.message, error.hint, path="pattern") from error
        if isinstance(pattern, NofM) and abs(pattern.sparsity - self.sparsity) > 1e-6:
            raise wrong(
                f"{self.pattern} has a sparsity of {pattern.sparsity:g}",
                f"sparsity: {pattern.sparsity:g}",
                path="sparsity",
            )
        return pattern

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.plan import apply
        from slimkit.sparsify import sparsity_table

        if self.method == "one-shot":
            apply(model, self._one_shot(model))
            history = train_model(model, self, self, context)
        else:
            pruner = self._pruner(model)
            history = train_model(model, self, self, context, callbacks=[pruner])
            apply(model, pruner.plan())
        return StageResult(model, {**training_facts(history), "zeros": sparsity_table(model)})

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks the patterns and the teacher; sizes stay as they are."""
        from slimkit.plan import apply

        context.task.tuned(self)
        check_distillation(model, self, context)
        return apply(model, self._one_shot(model))

    def training_epochs(self) -> float:
        """See the base class."""
        return float(self.epochs)

    def _choice(self) -> dict[str, Any]:
        pattern = self.chosen_pattern()
        return {"scope": self.scope, "only": self.only, "skip": self.skip, "pattern": pattern}

    def _one_shot(self, model: nn.Module) -> Any:
        from slimkit.sparsify import NofM, plan

        choice = self._choice()
        sparsity = None if isinstance(choice["pattern"], NofM) else self.sparsity
        return plan(model, sparsity=sparsity, **choice)

    def _pruner(self, model: nn.Module) -> GradualPruner:
        from slimkit.sparsify import GradualPruner, GradualSchedule

        schedule = GradualSchedule.over(
            _RESOLUTION,
            stable=self.stable,
            pruning=self.pruning,
            updates=self.updates,
            initial=self.initial,
        )
        return GradualPruner(model, self.sparsity, schedule=schedule, **self._choice())
