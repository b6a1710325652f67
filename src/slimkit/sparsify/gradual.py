"""Gradual magnitude pruning (GMP) during training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import CheckpointError, InputError
from slimkit.graph.patterns import Pattern
from slimkit.sparsify.eligible import Skip, eligible_weights
from slimkit.sparsify.holding import Multiplier
from slimkit.sparsify.magnitude import check_sparsity, magnitude_masks
from slimkit.sparsify.masks import MaskPlan, pack_bits, unpack_bits
from slimkit.sparsify.one_shot import fitting, mask_plan
from slimkit.sparsify.patterns import NofM, SparsityPattern
from slimkit.sparsify.schedule import GradualSchedule
from slimkit.train.callbacks import Callback

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["GradualPruner"]


@door
class GradualPruner(Callback):
    """Gradual magnitude pruning: ever more of the smallest weights become zero while it trains.

    Zhu & Gupta 2017, "To prune, or not to prune", with the three phases of
    :class:`~slimkit.sparsify.schedule.GradualSchedule`. In a loop of your own call :meth:`step`
    after each ``optimizer.step()``; :func:`slimkit.train.fit` takes it as a callback. At the end
    :meth:`plan` gives the masks for :func:`slimkit.apply`.

    Weights that are zero do not come back: their updates are undone after each step. Masks depend
    on the weights alone, so that processes with equal weights have equal masks.

    Args:
        model: trained in place.
        sparsity: fraction of zeros at the end, above 0 and below 1.
        steps: optimizer steps of the whole training; half of them prune, half of them tune.
        schedule: in place of ``steps``. :func:`slimkit.train.fit` stretches it to its own length.
        scope: ``"layer"``: each layer has this sparsity; ``"global"``: all of them together.
        pattern: ``Block(2, 1)`` for blocks, ``NofM(2, 4)`` (then with the sparsity that follows
            from it, at the end of the pruning phase), None for single weights.
        only: ``"conv1x1"``, or patterns of modules whose weights alone may become zero.
        skip: patterns of modules that stay dense, or functions ``f(name, module, weight)``.

    Raises:
        InputError: a number is out of range, or neither or both of steps and schedule are given.
        PatternError: a pattern matches nothing.
        PlanError: no weight may become zero.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        steps: int | None = None,
        schedule: GradualSchedule | None = None,
        scope: str = "layer",
        pattern: SparsityPattern | None = None,
        only: str | Pattern | Iterable[Pattern] | None = None,
        skip: Skip | Iterable[Skip] = (),
    ) -> None:
        if (steps is None) == (schedule is None):
            raise InputError("expected steps or a schedule", where="steps", hint="steps=1000")
        self.sparsity = check_sparsity(sparsity)
        self.schedule = GradualSchedule.over(steps or 0) if schedule is None else schedule
        self.schedule.sparsity(0, self.sparsity)
        if isinstance(pattern, NofM) and abs(pattern.sparsity - sparsity) > 1e-6:
            raise InputError(
                f"{pattern.n}:{pattern.m} has a sparsity of {pattern.sparsity:g}, not {sparsity:g}",
                where="sparsity",
            )
        if scope not in ("layer", "global"):
            raise InputError(f"unknown scope {scope!r}", where="scope", hint="layer or global")
        self.scope, self.pattern = scope, pattern
        self._found = fitting(eligible_weights(model, only=only, skip=skip), pattern)
        self._steps = 0
        self._now = 0.0
        ones = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self._found.weights.items()
        }
        self._multiplier = Multiplier(model, ones)

    @property
    def current(self) -> float:
        """Sparsity that the schedule asks for now."""
        return self._now

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """True where a weight stays, by the name of the parameter."""
        return dict(self._multiplier.masks)

    def step(self) -> None:
        """Renew the masks if the schedule says so, and set the weights to zero."""
        self._advance(self._steps)

    def plan(self) -> MaskPlan:
        """The masks of now as a plan."""
        settings = {
            "method": "gradual magnitude",
            "sparsity": self._now,
            "scope": self.scope,
            "pattern": str(self.pattern) if self.pattern else None,
            "steps": self._steps,
        }
        return mask_plan(self._found, self._multiplier.masks, settings)

    def on_update(self, context: StepContext) -> None:
        """See the base class. The schedule is stretched to the length of the training."""
        done = context.progress * (context.step + 1) / context.step if context.step else 0.0
        self._advance(min(int(done * self.schedule.steps), self.schedule.steps - 1))

    def state_dict(self) -> dict[str, Any]:
        """Steps so far, and the masks, one bit a weight."""
        masks = {f"mask.{name}": pack_bits(mask) for name, mask in self.masks.items()}
        return {"steps": self._steps, "sparsity": self._now, **masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            CheckpointError: it is of other weights.
        """
        masks = {}
        for name, weight in self._found.weights.items():
            packed = state.get(f"mask.{name}")
            if not isinstance(packed, Tensor) or packed.numel() != -(-weight.numel() // 8):
                raise CheckpointError(
                    "the state of the pruner has no mask of this size for it", where=name
                )
            masks[name] = unpack_bits(packed, weight.shape).to(weight.device)
        self._steps, self._now = int(state["steps"]), float(state["sparsity"])
        self._multiplier.replace(masks)

    def _advance(self, step: int) -> None:
        target = self.schedule.sparsity(step, self.sparsity)
        self._steps = step + 1
        if target > self._now:
            self._renew(target)
        if self._now:
            self._multiplier.apply()

    def _renew(self, target: float) -> None:
        # N:M comes last: until then single weights fall, as many as the schedule says
        unfinished = isinstance(self.pattern, NofM) and target < self.sparsity
        pattern = None if unfinished else self.pattern
        masks = magnitude_masks(self._found.weights, target, scope=self.scope, pattern=pattern)
        self._multiplier.replace(masks)
        self._now = target
