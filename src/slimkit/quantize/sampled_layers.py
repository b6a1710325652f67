"""What a layer computes, on a sample of the positions that it is applied at."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimkit.quantize.layer_calls import grouped

__all__ = ["Samples", "answers", "importance"]


@dataclass(frozen=True)
class Samples:
    """What reaches a layer at some positions of some images, and what it should answer.

    Attributes:
        inputs: of the quantized network, (groups, P, inputs of one output).
        targets: of the float network before the activation function, (P, out).
        bias: of the quantized network.
    """

    inputs: Tensor
    targets: Tensor
    bias: Tensor | None


def answers(samples: Samples, weight: Tensor, picks: Tensor | slice, *, bias: bool = True) -> Tensor:
    """What a layer with that weight answers at some of the positions, (P, out)."""
    inputs = samples.inputs[:, picks]
    product = inputs @ grouped(weight, len(inputs)).transpose(1, 2)
    output = product.transpose(0, 1).flatten(1)
    return output if samples.bias is None or not bias else output + samples.bias


def importance(samples: Samples, weight: Tensor) -> Tensor:
    """How much the square of an error of each weight counts in the output: E[x²].

    Returns:
        Of the shape of ``weight``.
    """
    squares = samples.inputs.square().mean(1, keepdim=True)
    return squares.expand_as(grouped(weight, len(squares))).reshape(weight.shape)
