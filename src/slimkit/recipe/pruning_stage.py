"""``type: prune``: remove channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from slimkit.recipe.fields import OneOf, wrong
from slimkit.recipe.stages import Stage, StageContext, StageResult

if TYPE_CHECKING:
    from torch import nn

    from slimkit.prune import PrunePlan

__all__ = ["PruneStage"]

Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class PruneStage(Stage):
    """Structured pruning: whole channels leave, the tensors get smaller.

    Exactly one of ``ratio``, ``macs`` and ``params`` is the target; each is a fraction REMOVED.

    Attributes:
        ratio: fraction of the channels of every prunable group.
        macs: at least this fraction of the multiply-accumulates.
        params: at least this fraction of the parameters.
        criterion: which channels matter least.
        allocation: how the target is spread over the groups.
        ignore: patterns of layers that keep their channels.
        only: patterns of layers that alone may lose channels; empty for all.
        round_to: kept channels are a multiple of this.
        batch_norm_reestimation: training batches for fresh batch-norm statistics; 0 for none.
    """

    version: ClassVar[int] = 1
    type: Literal["prune"] = "prune"
    ratio: Fraction | None = None
    macs: Fraction | None = None
    params: Fraction | None = None
    criterion: Annotated[str, OneOf("slimkit.prune:CRITERIA")] = "l2"
    allocation: Annotated[str, OneOf("slimkit.prune:ALLOCATIONS")] = "uniform"
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    round_to: int = Field(default=8, ge=1)
    batch_norm_reestimation: int = Field(default=20, ge=0)

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [n for n in ("ratio", "macs", "params") if getattr(self, n) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise wrong(
                f"expected exactly one of ratio, macs and params, got {found}",
                "macs: 0.5 removes half of the multiply-accumulates",
            )
        return self

    def plan(self, model: nn.Module, context: StageContext) -> PrunePlan:
        """The plan for ``model``, which is not changed."""
        from slimkit import prune

        target: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("ratio", "macs", "params")
            if getattr(self, name) is not None
        }
        return prune.plan(
            model.eval(),
            context.example_inputs,
            **target,
            criterion=self.criterion,
            allocation=self.allocation,
            ignore=self.ignore,
            only=self.only,
            round_to=self.round_to,
        )

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.plan import apply
        from slimkit.train import reestimate_batch_norm

        plan = self.plan(model, context)
        model = apply(model, plan)
        count = self.batch_norm_reestimation
        if count:
            count = count if context.max_steps is None else min(count, context.max_steps)
            context.splits.train.set_epoch(0)
            batches = (images for images, _ in context.splits.train.batches(count))
            reestimate_batch_norm(model, batches)
        channels = [
            {"layer": layer, "kept": kept, "total": total}
            for layer, (kept, total) in plan.kept.items()
        ]
        return StageResult(model, {"channels": channels})

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class.

        Prunes by the untrained weights: the sizes are right for uniform allocation and near
        for the others.
        """
        from slimkit.plan import apply

        return apply(model, self.plan(model, context))
