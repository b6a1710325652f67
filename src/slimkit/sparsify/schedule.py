"""The schedule of gradual magnitude pruning: how sparse a network is at each training step."""

from __future__ import annotations

from dataclasses import dataclass

from slimkit.doors import door
from slimkit.errors import InputError

__all__ = ["GradualSchedule"]


@door
@dataclass(frozen=True)
class GradualSchedule:
    """Cubic schedule in three phases, in optimizer steps (Zhu & Gupta 2017, equation 1).

    Nothing happens in the stable phase. In the pruning phase the masks are renewed ``updates``
    times at equal distances; the i-th time (from 0) to the sparsity
    ``initial + (target - initial) · (1 + (i / updates - 1)³)``. From then on, in the tuning
    phase, the sparsity is the target.

    Args:
        stable: steps before the first zero; 0 for a trained network.
        pruning: steps in which it becomes sparse, 1 or more.
        tuning: steps at the end with fixed masks.
        updates: how often masks are renewed in the pruning phase, 1 … ``pruning``.
        initial: sparsity at the first of them, 0 … 1; below the target.

    Raises:
        InputError: a number is out of range.
    """

    stable: int
    pruning: int
    tuning: int
    updates: int = 100
    initial: float = 0.15

    def __post_init__(self) -> None:
        for name, least in (("stable", 0), ("pruning", 1), ("tuning", 0), ("updates", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"expected a whole number of at least {least}, got {value!r}",
                    where=f"schedule.{name}",
                )
        if self.updates > self.pruning:
            raise InputError(
                f"{self.updates} updates do not fit into {self.pruning} steps of pruning",
                where="schedule.updates",
                hint=f"{self.pruning} at most",
            )
        if not 0 <= self.initial < 1:
            raise InputError(
                f"expected a fraction of 0 … 1, got {self.initial!r}", where="schedule.initial"
            )

    @classmethod
    def over(
        cls,
        steps: int,
        *,
        stable: float = 0.0,
        pruning: float = 0.5,
        updates: int = 100,
        initial: float = 0.15,
    ) -> GradualSchedule:
        """The schedule of a training of ``steps``, its phases as fractions of it.

        What is neither stable nor pruning is tuning. With fewer steps of pruning than
        ``updates`` masks are renewed at every one of them.

        Raises:
            InputError: the phases are longer than the training.
        """
        if steps < 1:
            raise InputError(f"expected at least one step, got {steps}", where="steps")
        if stable < 0 or pruning <= 0 or stable + pruning > 1 + 1e-9:
            raise InputError(
                f"the phases are longer than the training: {stable:g} stable and {pruning:g} "
                "pruning of 1",
                where="schedule",
                hint="stable: 0, pruning: 0.5 leaves half for tuning",
            )
        still = min(int(steps * stable), steps - 1)
        busy = max(1, min(round(steps * pruning), steps - still))
        return cls(still, busy, steps - still - busy, min(updates, busy), initial)

    @property
    def steps(self) -> int:
        """Of all three phases."""
        return self.stable + self.pruning + self.tuning

    def sparsity(self, step: int, target: float) -> float:
        """Fraction of zeros after optimizer step number ``step`` (from 0); 0 in the stable phase.

        With the last step it is the target, also where there is no phase of tuning.

        Raises:
            InputError: the target is not above ``initial``.
        """
        if target <= self.initial:
            raise InputError(
                f"the sparsity {target:g} is not above the {self.initial:g} it begins with",
                where="schedule.initial",
                hint="0",
            )
        if step >= self.steps - 1:
            return target
        if step < self.stable:
            return 0.0
        update = (step - self.stable) // (self.pruning // self.updates)
        if update >= self.updates:
            return target
        return self.initial + (target - self.initial) * (1 + (update / self.updates - 1) ** 3)
