"""Block reconstruction (BRECQ, QDrop): a block's layers rounded together, on its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slimkit.quantize.methods.adaround import AdaRound, round_layer
from slimkit.quantize.methods.blocks import Block, TensorSource
from slimkit.quantize.methods.fixed_weights import (
    Grid,
    ScaleChoice,
    check,
    choose_grid,
    fix,
    weight_of,
)
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.learning import learning_only
from slimkit.quantize.methods.soft_rounding import RoundingSchedule, SoftRounding, optimise
from slimkit.quantize.methods.streams import BlockCall, RoundedLayer, Streams
from slimkit.quantize.outputs.distance import float_tensors
from slimkit.quantize.quantizers.fixed import ActivationQuantizer
from slimkit.quantize.wrapper import Rounding

__all__ = ["Reconstruct"]


@dataclass(frozen=True)
class Reconstruct:
    """Rounding learned block after block, on whole images.

    BRECQ (Li et al., 2021, https://arxiv.org/abs/2102.05426): what counts is the output of a
    residual block, so that its layers make up for each other's errors; activation scales are
    learned along. QDrop (Wei et al., 2022, https://arxiv.org/abs/2203.05740): meanwhile every
    activation stays unrounded with probability ``drop``, which finds roundings that hold for other
    images too. Blocks are modules that depend on their arguments alone; what counts of several
    outputs is the first. Layers beside blocks are rounded as by
    :class:`~slimkit.quantize.methods.adaround.AdaRound`. Whole blocks run forwards and backwards:
    this wants a GPU or patience.

    Attributes:
        iterations: steps of Adam per block or layer.
        batch: images per step.
        lr: learning rate of roundings.
        images: calibration examples.
        drop: probability in [0, 1] that an activation stays unrounded at a step; 0 is BRECQ.
        activation_lr: learning rate of the logarithms of activation scales; 0 leaves them.
        largest: a module with more layers is taken apart.
        scale: of the weights, ``"mse"`` or ``"max"``.
        regularisation: as in AdaRound.
        warm_start: likewise.
        seed: of images and drops.

    Raises:
        InputError: a value is not valid.
    """

    when: ClassVar[Literal["before", "after"]] = "after"

    iterations: int = 300
    batch: int = 8
    lr: float = 0.1
    images: int = 128
    drop: float = 0.5
    activation_lr: float = 0.001
    largest: int = 8
    scale: ScaleChoice = "mse"
    regularisation: float = 10.0
    warm_start: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("iterations", "batch", "lr", "images", "largest")
        check(
            choice=self.scale,
            counts={name: getattr(self, name) for name in names},
            shares={"drop": self.drop, "warm_start": self.warm_start},
        )

    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.interface.Method`."""
        streams = Streams(work, self.images, largest=self.largest)
        units = list(self._units(streams))
        with work.display(len(units), "reconstruct") as display:
            for number, (block, layers) in enumerate(units, start=1):
                if block is None:
                    news = round_layer(self._alone(), work, streams, layers[0])
                else:
                    news = _Reconstruction(self, work, streams, block, layers).run()
                display.step(number, news)

    def _units(self, streams: Streams) -> Iterator[tuple[Block | None, list[RoundedLayer]]]:
        """Blocks with the layers that are to be rounded in them, and single layers."""
        seen: set[str] = set()
        todo = [layer for layer in streams.layers if layer.weight.scale == "follows"]
        for layer in todo:
            block = streams.around(layer)
            layers = [other for other in todo if block and streams.around(other) == block]
            if block is None or len(layers) < 2:
                yield None, [layer]
            elif block.path not in seen:
                seen.add(block.path)
                yield block, layers

    def schedule(self) -> RoundingSchedule:
        """The course of the optimisation."""
        return RoundingSchedule(self.iterations, self.lr, self.regularisation, self.warm_start)

    def _alone(self) -> AdaRound:
        return AdaRound(
            iterations=self.iterations,
            lr=self.lr,
            images=self.images,
            scale=self.scale,
            regularisation=self.regularisation,
            warm_start=self.warm_start,
            seed=self.seed,
        )


class _Reconstruction:
    """One block that is being optimised."""

    def __init__(
        self,
        settings: Reconstruct,
        work: Work,
        streams: Streams,
        block: Block,
        layers: list[RoundedLayer],
    ) -> None:
        self._settings, self._block, self._layers = settings, block, layers
        self._quantized = work.quantized
        self._module = work.quantized.model.get_submodule(block.path)
        self._calls = streams.tensors(block)
        self._targets = [float_tensors(call.answer)[0] for call in self._calls]
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._roundings: dict[str, SoftRounding] = {}
        self._grids: dict[str, Grid] = {}
        for layer in layers:
            spec = layer.weight
            weight = weight_of(work.quantized, spec)
            grid = choose_grid(weight, spec, settings.scale)
            self._grids[spec.name] = grid
            self._roundings[spec.name] = SoftRounding(weight, grid)
        self._drop = _Drop(settings.drop, self._targets[0].device, settings.seed)
        self._activations = {
            name: _LearnedScale(quantizer, self._drop) for name, quantizer in self._inside()
        }

    def run(self) -> str:
        """Optimise, and fix what came out unless nearest rounding is better; says how it went."""
        nearest = self._levels()
        self._fix(nearest)
        start = self._error({})
        learned = [activation.change for activation in self._activations.values()]
        with learning_only(self._module):
            optimise(
                list(self._roundings.values()),
                lambda: self._loss() / max(start, 1e-20),
                self._settings.schedule(),
                learned if self._settings.activation_lr else [],
                others_lr=self._settings.activation_lr,
            )
        self._fix(self._levels())
        after = self._error(self._activations)
        if after < start:
            for activation in self._activations.values():
                activation.adopt()
        else:
            self._fix(nearest)
        return f"{self._block.path}: error {start:.3g} → {min(start, after):.3g}"

    def _inside(self) -> Iterator[tuple[str, ActivationQuantizer]]:
        """The quantizers of the activations that the block makes, or is the first to read."""
        calls, quantizers = self._quantized.plan.calls, self._quantized.quantizers
        rules = [calls[address] for address in self._block.addresses if address in calls]
        for name in sorted({n for r in rules for n in (*r.inputs.values(), *r.outputs.values())}):
            quantizer = quantizers[name]
            if isinstance(quantizer, ActivationQuantizer):
                yield name, quantizer

    def _levels(self) -> dict[str, Tensor]:
        return {name: rounding.levels() for name, rounding in self._roundings.items()}

    def _fix(self, levels: Mapping[str, Tensor]) -> None:
        for layer in self._layers:
            name = layer.weight.name
            fix(self._quantized, layer.weight, levels[name], self._grids[name])

    def _output(
        self, call: BlockCall, tensors: list[Tensor], replaced: Mapping[str, Rounding]
    ) -> Tensor:
        with self._quantized.attachment(replaced):
            output = call.arguments.call(self._module, tensors)
        return float_tensors(output)[0]

    def _loss(self) -> Tensor:
        """The squared error of a few images of one calibration batch."""
        number = int(torch.randint(len(self._targets), (), generator=self._generator))
        call, targets = self._calls[number], self._targets[number]
        picks = torch.randperm(len(targets), generator=self._generator)[: self._settings.batch]
        picks = picks.to(targets.device)
        parts = self._divisible(call, len(targets))
        given: dict[TensorSource, Tensor] = {}
        for source, part, rounded, exact in zip(
            self._block.sources, parts, call.rounded, call.exact, strict=True
        ):
            if source not in given:
                some = (rounded[picks], exact[picks]) if part else (rounded.clone(), exact)
                given[source] = self._drop(*some)
        output = self._output(
            call,
            [given[source] for source in self._block.sources],
            {**self._roundings, **self._activations},
        )
        return (output - (targets[picks] if any(parts) else targets)).square().mean()

    def _divisible(self, call: BlockCall, count: int) -> list[bool]:
        """Which inputs hold one entry per image; none where that cannot be told.

        A mask or a position embedding is one for all images. It is told from what is per image by
        another number of images in the example: what has not followed it is for all.
        """
        if len(call.rounded) == 1:
            return [True]
        block = self._block
        if count == block.size:
            return [False] * len(call.rounded)
        return [
            first == block.size and tensor.dim() > 0 and len(tensor) == count
            for first, tensor in zip(block.sizes, call.rounded, strict=True)
        ]

    @torch.no_grad()
    def _error(self, replaced: Mapping[str, Rounding]) -> float:
        """The mean squared error over all images, nothing dropped."""
        errors = []
        with self._drop.off():
            for call, targets in zip(self._calls, self._targets, strict=True):
                given = dict(zip(self._block.sources, call.rounded, strict=True))
                copies = {source: tensor.clone() for source, tensor in given.items()}
                output = self._output(call, [copies[s] for s in self._block.sources], replaced)
                errors.append(float((output - targets).square().mean()))
        return sum(errors) / len(errors)


class _Drop:
    """Leaves elements of a rounded tensor unrounded, by chance."""

    def __init__(self, probability: float, device: torch.device, seed: int) -> None:
        self._probability = probability
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, rounded: Tensor, exact: Tensor) -> Tensor:
        """A mixture of the two."""
        if not self._probability or not rounded.is_floating_point():
            return rounded
        chance = torch.rand(rounded.shape, generator=self._generator, device=rounded.device)
        return torch.where(chance < self._probability, exact, rounded)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, everything is rounded."""
        before, self._probability = self._probability, 0.0
        try:
            yield
        finally:
            self._probability = before


class _LearnedScale(nn.Module):
    """Rounds an activation like its quantizer, with a scale that is learned.

    The gradient is that of LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153, equation 3),
    for the logarithm of the scale.
    """

    def __init__(self, quantizer: ActivationQuantizer, drop: _Drop) -> None:
        super().__init__()
        self._quantizers, self._drop = [quantizer], drop  # in a list: it is no part of this module
        self.change = nn.Parameter(torch.zeros_like(quantizer.scale))

    def scale(self) -> Tensor:
        """The scale now."""
        return self._quantizers[0].scale * self.change.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, any shape."""
        (quantizer,) = self._quantizers
        if not (quantizer.rounding and quantizer.ready):
            return x
        scale, zero = self.scale(), quantizer.zero_point
        low, high = quantizer.form.qmin - zero, quantizer.form.qmax - zero
        exact = x / scale
        levels = torch.clamp(exact + (exact.round() - exact).detach(), low, high)
        return self._drop(levels * scale, x)

    @torch.no_grad()
    def adopt(self) -> None:
        """Give the quantizer the scale that was learned, and the range that goes with it."""
        (quantizer,) = self._quantizers
        if not quantizer.ready:
            return
        form, zero = quantizer.form, quantizer.zero_point
        quantizer.scale.copy_(self.scale())
        quantizer.low.copy_((form.qmin - zero) * quantizer.scale)
        quantizer.high.copy_((form.qmax - zero) * quantizer.scale)
