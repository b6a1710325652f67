"""A moving average of the weights, which often generalises better than the last weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimkit.doors import door
from slimkit.errors import PlanError, nearest

if TYPE_CHECKING:
    from slimkit.plan import Plan

__all__ = ["WeightAverage"]


@door
class WeightAverage:
    """Exponential moving average (Polyak averaging as in Tarvainen & Valpola 2017, equation 1).

    ``average = d·average + (1 - d)·weights`` after each step, where ``d`` rises as
    ``(1 + t) / (10 + t)`` up to ``decay`` so that early steps are forgotten soon. Batch-norm
    statistics are averaged alike; other buffers are taken from the model as they are.

    Masks survive: entries of parameters that are exactly zero in the model are zero in the
    average too when it is used or saved (:meth:`keep_zeros`), though by the formula a rest of
    what they were before would be left.

    Args:
        model: whose weights to follow; its state when this is called is the first average.
        decay: the final ``d``, 0 … 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._live = _averaged(model)
        self._names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = [name for name, _ in model.named_parameters() if name in self._live]
        self.average = {name: t.detach().clone() for name, t in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after one more step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self.average.values()), list(self._live.values()), 1 - decay)

    @torch.no_grad()
    def keep_zeros(self) -> None:
        """Set to zero what is exactly zero in the parameters of the model."""
        for name in self._parameters:
            self.average[name].masked_fill_(self._live[name] == 0, 0)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the average into the model for good; see :meth:`keep_zeros`."""
        self.keep_zeros()
        for name, live in self._live.items():
            live.copy_(self.average[name])

    def follow(self, plan: Plan) -> Callable[[nn.Module], None]:
        """Go on with the model after a pruning plan: ``sk.apply(…, companions=[average])``.

        Raises:
            PlanError: the plan slices nothing, or is one for another model; nothing is changed.
        """
        foreign = [name for name in plan.sliced if name not in self._names]
        if foreign:
            raise PlanError(
                f"the model that is averaged has no {foreign[0]!r}",
                where="companions",
                hint=nearest(foreign[0], self._names),
            )
        sliced = {name: plan.slice_state(name, tensor) for name, tensor in self.average.items()}

        def go_on(model: nn.Module) -> None:
            self._live = _averaged(model)
            self.average = {name: sliced[name] for name in self._live}

        return go_on

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside of the ``with`` block."""
        held = {name: live.detach().clone() for name, live in self._live.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, live in self._live.items():
                    live.copy_(held[name])


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and batch-norm statistics, by name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for name in ("running_mean", "running_var"):
                buffer = getattr(module, name)
                if buffer is not None:
                    tensors[f"{path}.{name}"] = buffer
    return {name: t for name, t in tensors.items() if t.is_floating_point()}
