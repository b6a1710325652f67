"""Bias tuning: all biases trained end to end by Adam on the outputs of the float network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from slimkit.errors import SlimkitError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.functions import function_of
from slimkit.inputs import Inputs
from slimkit.quantize.methods.fixed_weights import check
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.layer_calls import SUPPORTED, LayerCall
from slimkit.quantize.methods.learning import learning_only
from slimkit.quantize.outputs.distance import OutputDistance, float_tensors
from slimkit.quantize.scales import TINY
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["BiasTuning"]

_AT_ONCE = 8
"""Examples per forward and backward pass: the activations that autograd keeps for them bound the
memory; gradients of several passes add up to a batch."""
_HELD_OUT = 0.25
"""Share of the examples that is not trained on, and decides whether the biases are kept."""


@dataclass(frozen=True)
class BiasTuning:
    """The biases of integer layers, trained end to end against the float network's outputs.

    Methods that go layer after layer know each layer's output, not the network's. Biases stay
    float until the export, so that they can take any value, and are so few that a hundred images
    without labels train them (as in the end-to-end phase of EfficientQAT, Chen et al., 2024,
    https://arxiv.org/abs/2407.11062, section 3.3, which trains scales). The loss is the squared
    difference from the float network's outputs, relative to these. The last quarter of the images
    is held out: if the outputs on them do not come nearer, the biases stay as they were. That is
    fair where the methods before have not seen them either: let those look at fewer images. Whole
    images run forwards and backwards. Layers without a bias stay as they are.

    Attributes:
        steps: of Adam.
        batch: images per step.
        lr: at the first step, in units of the root mean square of a layer's output; it falls to 0
            along a cosine.
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
        """See :class:`~slimkit.quantize.methods.interface.Method`."""
        portions = _portions(list(work.inputs(self.images)))
        held = math.ceil(_HELD_OUT * len(portions))
        seen, others = portions[:-held], portions[-held:]
        if not seen:
            warnings.warn("no bias is tuned: one image cannot be divided", stacklevel=2)
            return
        biases = _biases(work.quantized, seen[0])
        if not biases:
            return
        before = [bias.detach().clone() for bias, _ in biases]
        try:
            judge = OutputDistance(work.reference, others)
            noise = judge.noise(work.quantized)
            self._train(work, biases, _Targets(work.reference, seen))
            better = judge.noise(work.quantized) < noise
        except (SlimkitError, RuntimeError, ValueError) as error:  # of shapes, or of derivatives
            warnings.warn(f"no bias is tuned: {error}", stacklevel=2)
            better = False
        if not better:
            with torch.no_grad():
                for (bias, _), value in zip(biases, before, strict=True):
                    bias.copy_(value)

    def _train(
        self, work: Work, biases: Sequence[tuple[nn.Parameter, float]], targets: _Targets
    ) -> None:
        groups = [{"params": [bias], "lr": self.lr * unit} for bias, unit in biases]
        optimizer = torch.optim.Adam(groups)
        course = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        order = _shuffled(len(targets), self.seed)
        with (
            learning_only(work.quantized, [bias for bias, _ in biases]),
            work.display(self.steps, "bias_tuning") as display,
        ):
            for step in range(1, self.steps + 1):
                optimizer.zero_grad()
                noise, examples = 0.0, 0
                while examples < self.batch:
                    number = next(order)
                    noise += targets.backward(work.quantized, number)
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


class _Biases(AddressMode):
    """Finds the biases of integer layers, and how large the outputs of these are.

    Attributes:
        found: identity of a bias → the bias, and the root mean square of its layer's output.
    """

    def __init__(self, quantized: QuantizedModel) -> None:
        self._wanted = {
            decision.address
            for decision in quantized.plan.decisions
            if decision.weight is not None and function_of(decision.address) in SUPPORTED
        }
        super().__init__(quantized.model, quantized.plan.table, self._wanted)
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


@torch.no_grad()
def _biases(quantized: QuantizedModel, example: Inputs) -> list[tuple[nn.Parameter, float]]:
    """The biases that are trained, each with what counts as 1 there."""
    finder = _Biases(quantized)
    with finder:
        example.call(quantized.model)
    return list(finder.found.values())


def _portions(batches: list[Inputs]) -> list[Inputs]:
    """The batches in parts that are small enough, and at least four where that can be."""
    total = sum(batch.examples or 1 for batch in batches)
    size = min(_AT_ONCE, math.ceil(_HELD_OUT * total))
    return [portion for batch in batches for portion in batch.split(size)]


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """0 … count − 1 in another order each time, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
