"""AdaRound: layer after layer, weights are rounded up or down so that outputs stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slimkit.quantize.methods.fixed_weights import (
    ScaleChoice,
    check,
    choose_grid,
    fix,
    weight_of,
)
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.sampled_layers import (
    answers,
    centre,
    compensation,
    importance,
    keep_mean,
)
from slimkit.quantize.methods.soft_rounding import RoundingSchedule, SoftRounding, optimise
from slimkit.quantize.methods.streams import RoundedLayer, Streams

__all__ = ["AdaRound", "round_layer"]


@dataclass(frozen=True)
class AdaRound:
    """Rounding learned layer after layer, on what reaches the layer in the quantized network.

    Nagel et al., 2020 (https://arxiv.org/abs/2004.10568), on the layer's output behind its
    activation function. The paper asks for the float network's output (equation 25), and a rounding
    that is learned from few images then learns the noise of their inputs as well. With
    ``compensate`` a change of the float weight makes up for the inputs, and rounding is to preserve
    what that weight answers. Layers whose weights are fixed already stay as they are.

    Attributes:
        iterations: steps of Adam per layer.
        batch: output positions per step.
        lr: learning rate.
        images: calibration examples to sample positions from.
        positions: samples of a layer, from all images together.
        compensate: first change the float weight so that it makes up for the errors of its inputs
            (:func:`~slimkit.quantize.methods.sampled_layers.compensation`), and correct the bias.
        scale: of the weights, chosen beforehand: ``"mse"`` for the smallest squared error, which
            may clip, or ``"max"``.
        regularisation: weight of the term that draws roundings to 0 or 1, against an output error
            of 1 for rounding to nearest.
        warm_start: fraction of the steps without that term.
        beta_start: its exponent at the end of the warm start.
        beta_end: its exponent at the last step.
        seed: of the samples.

    Raises:
        InputError: a value is not valid.
    """

    when: ClassVar[Literal["before", "after"]] = "after"

    iterations: int = 300
    batch: int = 512
    lr: float = 0.1
    images: int = 256
    positions: int = 4096
    compensate: bool = True
    scale: ScaleChoice = "mse"
    regularisation: float = 10.0
    warm_start: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("iterations", "batch", "lr", "images", "positions", "beta_start", "beta_end")
        check(
            choice=self.scale,
            counts={name: getattr(self, name) for name in names},
            shares={"warm_start": self.warm_start},
        )

    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.interface.Method`."""
        streams = Streams(work, self.images)
        layers = [layer for layer in streams.layers if layer.weight.scale == "follows"]
        with work.display(len(layers), "adaround") as display:
            for number, layer in enumerate(layers, start=1):
                display.step(number, round_layer(self, work, streams, layer))

    def schedule(self) -> RoundingSchedule:
        """The course of the optimisation."""
        return RoundingSchedule(
            self.iterations,
            self.lr,
            self.regularisation,
            self.warm_start,
            (self.beta_start, self.beta_end),
        )


@torch.no_grad()
def round_layer(settings: AdaRound, work: Work, streams: Streams, layer: RoundedLayer) -> str:
    """Learn the rounding of one layer and fix its weight; returns what came of it."""
    generator = torch.Generator().manual_seed(settings.seed)
    samples = streams.draw(layer, settings.positions, generator)
    if samples is None:
        return f"{layer.module} never ran"
    spec = layer.weight
    original = weight = weight_of(work.quantized, spec)
    wanted = samples.targets
    if settings.compensate:
        weight = original + compensation(samples, original)
        centre(samples, original)
        keep_mean(samples, original, weight)
        wanted = answers(samples, weight, slice(None))
    grid = choose_grid(weight, spec, settings.scale, importance(samples, weight))
    rounding = SoftRounding(weight, grid)
    targets: Tensor = layer.activation(wanted.clone())

    def error(rounded: Tensor, picks: Tensor | slice = slice(None)) -> Tensor:
        given: Tensor = layer.activation(answers(samples, rounded, picks))
        difference = given - targets[picks]
        return difference.square().sum(1).mean()

    nearest = rounding.levels()
    before = error(nearest * rounding.steps)

    def loss() -> Tensor:
        picks = torch.randint(len(targets), (settings.batch,), generator=generator)
        return error(rounding(), picks.to(targets.device)) / before.clamp(min=1e-20)

    optimise([rounding], loss, settings.schedule())
    after = error(rounding.levels() * rounding.steps)
    fix(work.quantized, spec, rounding.levels() if after < before else nearest, grid)
    if settings.compensate:
        keep_mean(samples, weight, weight_of(work.quantized, spec))
    return f"{layer.module}: error {before:.3g} → {min(before, after):.3g}"
