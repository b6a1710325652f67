"""AdaRound's soft rounding: whether each weight goes up or down is found by gradient descent.

Nagel et al., 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"
(https://arxiv.org/abs/2004.10568). With the scale s held, a weight becomes

    w̃ = s · clamp(⌊w / s⌋ + h(v), qmin, qmax),   h(v) = clamp(σ(v)(ζ − γ) + γ, 0, 1)

(equations 22 and 23; ζ = 1.1, γ = −0.1), where v is trained so that the outputs of a layer or a
block come near those of the float network while ``1 − |2 h(v) − 1|^β`` (equation 24) draws every
h to 0 or 1, the more so the smaller β has become.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimkit.quantize.methods.fixed_weights import Grid

__all__ = ["RoundingSchedule", "SoftRounding", "optimise", "rectified_sigmoid"]

_ZETA, _GAMMA = 1.1, -0.1
"""ζ and γ of equation 23, the ends of the stretched sigmoid; the paper's values."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(v) of equation 23: a sigmoid stretched to −0.1 … 1.1 and cut to 0 … 1."""
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0.0, 1.0)


class SoftRounding(nn.Module):
    """A weight between its lower and its upper level.

    Zeros stay zero, and weights beyond the grid stay at its end.

    Args:
        weight: float, not changed.
        grid: of its levels.

    Attributes:
        v: what is trained; at first h(v) is where the float weight lies.
        steps: of the grid.
    """

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        super().__init__()
        self.steps = grid.steps
        exact = torch.div(weight.detach().float(), self.steps)
        floor = exact.floor()
        self._moves = (exact != 0) & (floor >= grid.lowest) & (floor < grid.highest)
        self._base = torch.where(self._moves, floor, grid.nearest(weight.detach().float()))
        rest = torch.where(self._moves, exact - floor, torch.full_like(exact, 0.5))
        inner = (rest - _GAMMA) / (_ZETA - _GAMMA)
        self.v = nn.Parameter(torch.logit(inner))

    def forward(self, _weight: Tensor | None = None) -> Tensor:
        """The soft weight; takes the place of a quantizer, so it is called with the weight."""
        return (self._base + self._moves * rectified_sigmoid(self.v)) * self.steps

    def regulariser(self, beta: float) -> Tensor:
        """The mean of equation 24 over the weights: 1 in the middle between levels, 0 on one."""
        away = (2.0 * rectified_sigmoid(self.v) - 1.0).abs()
        return ((1.0 - away**beta) * self._moves).mean()

    @torch.no_grad()
    def levels(self) -> Tensor:
        """The integers that the weights are now nearest to, as float32."""
        return self._base + (self._moves & (rectified_sigmoid(self.v) >= 0.5))


@dataclass(frozen=True)
class RoundingSchedule:
    """The course of an optimisation.

    Attributes:
        iterations: number of steps.
        lr: learning rate of Adam for the roundings.
        warm_start: fraction of the steps without regulariser.
        beta: β at the end of the warm start and at the last step; in between half a cosine.
        weight: of the regulariser, against an output error of 1.
    """

    iterations: int
    lr: float
    weight: float
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def beta_at(self, step: int) -> float | None:
        """β at a step, ``None`` during the warm start."""
        start = self.warm_start * self.iterations
        if step < start:
            return None
        progress = (step - start) / max(1.0, self.iterations - start)
        first, last = self.beta
        return last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * progress))


@torch.enable_grad()
def optimise(
    roundings: Sequence[SoftRounding],
    loss: Callable[[], Tensor],
    schedule: RoundingSchedule,
    others: Sequence[nn.Parameter] = (),
    *,
    others_lr: float = 0.0,
) -> None:
    """Train the roundings of a layer or a block, in place.

    Args:
        roundings: of its weights.
        loss: the output error of a batch that it chooses, divided by the error of rounding to
            nearest, so that one weight of the regulariser suits all layers.
        schedule: how.
        others: more to train, without regulariser.
        others_lr: their learning rate, which falls to 0 along a cosine.
    """
    groups = [{"params": [rounding.v for rounding in roundings], "lr": schedule.lr}]
    groups += [{"params": list(others), "lr": others_lr}] if others else []
    optimizer = torch.optim.Adam(groups)
    for step in range(schedule.iterations):
        total = loss()
        beta = schedule.beta_at(step)
        if beta is not None:
            total = (
                total
                + schedule.weight
                * torch.stack([rounding.regulariser(beta) for rounding in roundings]).mean()
            )
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        if others:
            groups[1]["lr"] = others_lr * 0.5 * (1 + math.cos(math.pi * step / schedule.iterations))
        optimizer.step()
