"""How much a distillation loss counts as training goes on."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from slimkit.distill.recording.records import mistake
from slimkit.doors import door

__all__ = ["WeightSchedule", "WeightScheduleField"]


@door
class WeightSchedule(BaseModel):
    """A factor of a loss's weight over the run.

    Attributes:
        shape: ``constant``; ``linear`` or ``cosine`` from 1 to ``final`` over the run.
        final: factor ≥ 0 at the end of the run.
        start_epoch: before this epoch the factor is 0.
        stop_epoch: from this epoch on the factor is 0, and what the loss needs is not computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["constant", "linear", "cosine"] = "constant"
    final: float = Field(default=0.0, ge=0, le=1e6, allow_inf_nan=False)
    start_epoch: int = Field(default=0, ge=0, le=1_000_000)
    stop_epoch: int | None = Field(default=None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _starts_before_it_stops(self) -> Self:
        if self.stop_epoch is not None and self.stop_epoch <= self.start_epoch:
            raise mistake(
                f"it stops at epoch {self.stop_epoch}, before it starts",
                f"more than {self.start_epoch}",
                "stop_epoch",
            )
        return self

    @property
    def moves(self) -> bool:
        """Whether the factor depends on the time."""
        return self.shape != "constant" or self.start_epoch > 0 or self.stop_epoch is not None

    def factor(self, epoch: int, progress: float) -> float:
        """The factor at a moment of the run.

        Args:
            epoch: from 0.
            progress: part of the run that is over, 0 … 1.
        """
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        if self.shape == "constant":
            return 1.0
        remaining = 1 - progress
        if self.shape == "cosine":
            remaining = (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * remaining


def _read(value: Any) -> Any:
    return {"shape": value} if isinstance(value, str) else value


WeightScheduleField = Annotated[WeightSchedule, BeforeValidator(_read)]
"""The type of a settings field: a :class:`WeightSchedule`, or just its shape."""
