"""Signal to quantization noise (SQNR) and KL divergence of outputs, against the float network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from slimkit.errors import DataError, InputError
from slimkit.inputs import Inputs

__all__ = ["OutputDistance", "decibels", "float_tensors"]


class OutputDistance:
    """The outputs of a float network on some batches, and the distance of others from them.

    Args:
        model: the float network, in evaluation mode.
        batches: held in memory, together with the outputs.

    Raises:
        InputError: the network gives no tensor of floating-point numbers.
        DataError: its outputs are not finite, or all zero.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        self._batches = list(batches)
        self._reference = [self._outputs(model, batch) for batch in self._batches]
        if not self._reference or not self._reference[0]:
            raise InputError(
                "the network gives no floating-point tensor to compare",
                where="model",
                hint="pass evaluate=",
            )
        self._signal = [self._power(place) for place in range(len(self._reference[0]))]
        if not all(math.isfinite(power) for power in self._signal) or not any(self._signal):
            raise DataError(
                "the outputs of the float network are zero or not finite", where="model"
            )

    def noise(self, model: nn.Module) -> float:
        """Σ difference² / Σ output² over all batches; of several outputs the mean of theirs.

        Raises:
            InputError: what comes out has other shapes than the float network's outputs.
        """
        sums = [0.0] * len(self._signal)
        for batch, reference in zip(self._batches, self._reference, strict=True):
            outputs = self._outputs(model, batch)
            exact, found = ([tuple(x.shape) for x in side] for side in (reference, outputs))
            if exact != found:
                raise InputError(
                    f"outputs of shapes {found} cannot be compared with the float network's, "
                    f"of shapes {exact}",
                    where="model",
                    hint="pass evaluate=",
                )
            for place, (before, after) in enumerate(zip(reference, outputs, strict=True)):
                sums[place] += float((after.double() - before.double()).square().sum())
        ratios = [noise / power for noise, power in zip(sums, self._signal, strict=True) if power]
        return sum(ratios) / len(ratios)

    def divergence(self, model: nn.Module) -> float:
        """Kullback–Leibler divergence Σ p·log(p / q), in nats, mean over all decisions.

        p and q are softmax probabilities of the first output, float and quantized, over
        dimension 1 of (N, C, …) and the last one of (N, T, C).
        """
        total, count = 0.0, 0
        for batch, reference in zip(self._batches, self._reference, strict=True):
            before, after = reference[0], self._outputs(model, batch)[0]
            if before.dim() < 2:
                raise InputError("there are no classes in (N,) outputs", where="objective")
            axis = -1 if before.dim() == 3 else 1
            p, q = (F.log_softmax(x.double(), axis) for x in (before, after))
            divergence = F.kl_div(q, p, log_target=True, reduction="none").sum(axis)
            total, count = total + float(divergence.sum()), count + divergence.numel()
        return max(0.0, total / count)

    @torch.no_grad()
    def _outputs(self, model: nn.Module, batch: Inputs) -> Sequence[Tensor]:
        return float_tensors(batch.run(model))

    def _power(self, place: int) -> float:
        return sum(float(outputs[place].double().square().sum()) for outputs in self._reference)


def float_tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in what a network returned, in order."""
    leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def decibels(noise: float) -> float:
    """Signal to quantization noise in dB, −10·log₁₀(noise / signal).

    Infinite without noise, minus infinity where the noise is not a number.
    """
    if math.isnan(noise):
        return -math.inf
    return -10.0 * math.log10(noise) if noise > 0 else math.inf
