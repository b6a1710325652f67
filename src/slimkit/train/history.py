"""What a training run leaves behind beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slimkit.errors import TrainingError

__all__ = ["History", "finite_metrics"]


@dataclass
class History:
    """What happened during a run.

    Attributes:
        epochs: per epoch ``epoch``, ``loss`` (mean over its steps), ``lr`` (of the last step),
            ``seconds``, ``images_per_second`` and ``metrics`` (what ``evaluate`` returned);
            ``scalars``, means over the steps, where a step of one's own logs any; on a CPU
            ``cpu_share``, the part of the time that the training had its processor.
        final: metrics of the weights that the run ended with (averaged, batch norm measured
            anew), or nothing without ``evaluate``.
        precision: what was trained in.
        precision_ms: milliseconds per step of each precision, when it was chosen by timing.
        steps: optimizer steps.
        seconds: of all epochs and their evaluations.
        budget: with ``minutes`` in the settings: ``minutes``, ``epochs`` that fitted into them,
            and ``of``, the epochs that the settings would have had.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    precision_ms: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    budget: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary of all attributes."""
        return {
            "epochs": self.epochs,
            "final": self.final,
            "precision": self.precision,
            "precision_ms": self.precision_ms,
            "steps": self.steps,
            "seconds": self.seconds,
            "budget": self.budget,
        }


def finite_metrics(metrics: object, when: str) -> dict[str, float]:
    """The metrics of an evaluation, all of them finite.

    Args:
        metrics: name → value, as the user's function returned them.
        when: the evaluation took place, for the error: ``"after epoch 3"``.

    Raises:
        TrainingError: one is NaN or infinite, or there is no mapping from names to numbers.
    """
    if not isinstance(metrics, Mapping) or not all(map(_is_number, metrics.values())):
        raise TrainingError(
            f"the evaluation {when} gave no mapping from names to numbers: {metrics!r:.100}",
            where="evaluate",
        )
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the evaluation {when} is not finite: {name} is {value:g}",
                hint="a lower lr, warmup_epochs or clip_grad_norm keeps a training from diverging",
            )
    return dict(metrics)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (getattr(value, "ndim", None) == 0)
