"""End-to-end tuning: the scales of weights and the biases are trained on the network's outputs.

Methods that repair layer after layer know each layer's output, not the network's, and what their
errors have in common adds up on the way. Scales and biases are few, thousands where weights are
millions, so that a few hundred images without labels train them and are not learned by heart.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from slimkit.errors import SlimkitError
from slimkit.graph.addressing import AddressMode, function_of
from slimkit.inputs import Inputs
from slimkit.progress import ProgressDisplay
from slimkit.quantize.fixed_weights import check, fix, steps_of, weight_of
from slimkit.quantize.layer_calls import SUPPORTED, LayerCall
from slimkit.quantize.methods import Work
from slimkit.quantize.output_distance import OutputDistance, float_tensors
from slimkit.quantize.quantizers import WeightQuantizer
from slimkit.quantize.scales import TINY
from slimkit.quantize.scheme import QuantizerSpec
from slimkit.quantize.wrapper import QuantizedModel
from slimkit.runtime.fake_quantize import on_grid

__all__ = ["Tune"]

_AT_ONCE = 8
"""Examples that run forwards and backwards together: what they leave for the way back is kept."""
_HELD_OUT = 0.25
"""Of the images: they are not trained on, and say whether it was worth it."""

_HALF_A_STEP = 2.0 ** (1 / 32)
"""Of the grid that scales may have to lie on, which are rounded up to."""


@dataclass(frozen=True)
class Tune:
    """Scales of weights and biases trained end to end against the float network's outputs.

    The second phase of EfficientQAT (Chen et al., 2024, https://arxiv.org/abs/2407.11062, section
    3.3, "E2E-QP"), without labels and with biases: the integers stay, ``w = s · q``, and what moves
    is s, by a factor near 1. The loss is the squared difference from the float network's outputs
    relative to these. A quarter of the images is held out, and if they are not better off,
    everything stays as it was. Whole batches run forwards and backwards.

    Attributes:
        steps: of Adam.
        batch: images per step.
        lr: at the first step, of the logarithms of the scales, and of the biases in units of their
            layer's output (its root mean square); it falls to 0 along a cosine.
        images: calibration examples.
        seed: of the order of the images.

    Raises:
        InputError: a value is not valid.
    """

    when: ClassVar[Literal["before", "after"]] = "after"

    steps: int = 60
    batch: int = 32
    lr: float = 0.003
    images: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check(counts={name: getattr(self, name) for name in ("steps", "batch", "lr", "images")})

    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.Method`."""
        portions = _portions(list(work.inputs(self.images)))
        held = math.ceil(_HELD_OUT * len(portions))
        seen, others = portions[:-held], portions[-held:]
        if not seen:
            warnings.warn("nothing is tuned: one image cannot be divided", stacklevel=2)
            return
        tuned = _Tuned(work.quantized, portions[0])
        try:
            judge = OutputDistance(work.reference, others)
            before = judge.noise(tuned)
            self._train(tuned, _Targets(work.reference, seen), work.progress)
            better = judge.noise(tuned) < before
        except (SlimkitError, RuntimeError) as error:  # outputs that cannot be compared or derived
            warnings.warn(f"nothing is tuned: {error}", stacklevel=2)
            better = False
        if better:
            tuned.adopt()
        else:
            tuned.undo()

    def _train(self, tuned: _Tuned, targets: _Targets, progress: bool) -> None:
        rates = [(parameter, self.lr * unit) for parameter, unit in tuned.learned()]
        groups = [{"params": [parameter], "lr": lr} for parameter, lr in rates]
        optimizer = torch.optim.Adam(groups)
        course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = _shuffled(len(targets), self.seed)
        with (
            _learning_only(tuned, [parameter for parameter, _ in rates]),
            ProgressDisplay(self.steps, 0, label="tune", enabled=progress) as display,
        ):
            for step in range(1, self.steps + 1):
                optimizer.zero_grad()
                noise, examples = 0.0, 0
                while examples < self.batch:
                    number = next(order)
                    noise += targets.backward(tuned, number)
                    examples += targets.examples(number)
                optimizer.step()
                course.step()
                display.step(step, f"noise / signal {noise / examples:.3g}")


class _Targets:
    """What the float network answers, held in memory.

    Args:
        reference: the float network.
        portions: calibration data.
    """

    def __init__(self, reference: nn.Module, portions: list[Inputs]) -> None:
        self._portions = portions
        with torch.no_grad():
            self._answers = [float_tensors(portion.call(reference)) for portion in portions]
        total = sum(self.examples(number) for number in range(len(portions)))
        self._power = [
            torch.stack([answer.square().sum() for answer in answers]).sum().clamp(min=TINY) / total
            for answers in zip(*self._answers, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._portions)

    def examples(self, number: int) -> int:
        """Of one portion."""
        return self._portions[number].examples or 1

    @torch.enable_grad()
    def backward(self, model: nn.Module, number: int) -> float:
        """Add the gradient of noise / signal, summed over the examples of one portion.

        Returns:
            The sum, of several outputs the mean of theirs.
        """
        outputs = float_tensors(self._portions[number].call(model))
        pairs = zip(outputs, self._answers[number], self._power, strict=True)
        terms = [(output - answer).square().sum() / power for output, answer, power in pairs]
        noise = torch.stack(terms).mean()
        noise.backward()  # type: ignore[no-untyped-call]
        return float(noise.detach())


class _Tuned(nn.Module):
    """A quantized network with a factor at every scale of a weight; called like it.

    Args:
        quantized: its biases are trained in place, the rest does not change before :meth:`adopt`.
        example: calibration data, for the sizes of the layers' outputs.
    """

    def __init__(self, quantized: QuantizedModel, example: Inputs) -> None:
        super().__init__()
        self._quantized = quantized
        self._weights: dict[str, _ScaledWeight] = {}
        for spec in quantized.plan.quantizers:
            quantizer = quantized.quantizers[spec.name]
            if isinstance(quantizer, WeightQuantizer):
                weight = weight_of(quantized, spec)
                self._weights[spec.name] = _ScaledWeight(spec, weight, quantizer)
        biases = _Biases(quantized)
        with torch.no_grad(), biases:
            example.call(quantized.model)
        self._biases = list(biases.found.values())
        self._before = [bias.detach().clone() for bias, _ in self._biases]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's result."""
        with self._quantized.attachment(self._weights):
            return self._quantized.model(*args, **kwargs)

    def learned(self) -> list[tuple[nn.Parameter, float]]:
        """What is trained, and what counts as 1 there."""
        return [(weight.change, 1.0) for weight in self._weights.values()] + self._biases

    def adopt(self) -> None:
        """Give the network the scales."""
        for weight in self._weights.values():
            weight.adopt(self._quantized)

    @torch.no_grad()
    def undo(self) -> None:
        """Give the network its biases back."""
        for (bias, _), before in zip(self._biases, self._before, strict=True):
            bias.copy_(before)


class _ScaledWeight(nn.Module):
    """Integers that stay, and scales that do not; stands in for a weight's quantizer."""

    @torch.no_grad()
    def __init__(self, spec: QuantizerSpec, weight: Tensor, quantizer: WeightQuantizer) -> None:
        super().__init__()
        rounded = quantizer(weight)
        self._spec, self._scale = spec, quantizer.scale.clone()
        self._levels = torch.div(rounded, steps_of(self._scale, rounded, spec)).round()
        self.change = nn.Parameter(torch.zeros_like(self._scale))

    def forward(self, _weight: Tensor) -> Tensor:
        """The weight, whatever the float one is."""
        return self._levels * steps_of(self._scales(), self._levels, self._spec)

    @torch.no_grad()
    def adopt(self, quantized: QuantizedModel) -> None:
        """Fix the weight in the network."""
        fix(quantized, self._spec, self._levels, self._scales())

    def _scales(self) -> Tensor:
        """Where they must lie on a grid, the nearest there, with a gradient straight through."""
        scale = self._scale * self.change.exp()
        if not self._spec.compact:
            return scale
        nearest = on_grid(scale.detach() / _HALF_A_STEP)
        return scale + (nearest - scale.detach())


class _Biases(AddressMode):
    """Finds the biases of integer layers, and how large the outputs of these are.

    Attributes:
        found: identity of a bias → the bias, and the root mean square of its layer's output.
    """

    def __init__(self, quantized: QuantizedModel) -> None:
        super().__init__(quantized.model)
        self._wanted = {
            decision.address
            for decision in quantized.plan.decisions
            if decision.weight is not None and function_of(decision.address) in SUPPORTED
        }
        self.found: dict[int, tuple[nn.Parameter, float]] = {}

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        result = func(*args, **kwargs)
        bias = LayerCall.read(args, kwargs).bias if address in self._wanted else None
        if isinstance(bias, nn.Parameter):
            self.found[id(bias)] = (bias, float(result.square().mean().sqrt()))
        return result


@contextmanager
def _learning_only(model: nn.Module, learned: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, these and no other parameters of ``model`` take part in gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in learned}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None


def _portions(batches: list[Inputs]) -> list[Inputs]:
    """The batches in parts that are small enough, and at least four where that can be."""
    total = sum(batch.examples or 1 for batch in batches)
    size = min(_AT_ONCE, math.ceil(_HELD_OUT * total))
    return [portion for batch in batches for portion in _parts(batch, size)]


def _parts(batch: Inputs, size: int) -> list[Inputs]:
    if not batch.examples:
        return [batch]
    starts = range(0, batch.examples, size)
    return [batch.map(itemgetter(slice(start, start + size))) for start in starts]


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """0 … count − 1 in another order each time, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
