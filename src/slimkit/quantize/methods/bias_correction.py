"""Bias correction: the mean shift that rounding gives a layer's outputs goes into its bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from slimkit.quantize.methods.fixed_weights import check
from slimkit.quantize.methods.interface import Work
from slimkit.quantize.methods.sampled_layers import reliable_mean
from slimkit.quantize.methods.streams import RoundedLayer, Streams

__all__ = ["BiasCorrection"]


@dataclass(frozen=True)
class BiasCorrection:
    """The mean shift of every output channel goes into the bias, layer after layer.

    Nagel et al., 2019 (https://arxiv.org/abs/1906.04721, section 4.2), measured on calibration
    data: a layer's shift is taken when all layers before it are corrected, as far as the images
    agree about it (:func:`~slimkit.quantize.methods.sampled_layers.reliable_mean`). Layers without
    a bias stay as they are (batch norms that were folded left one).

    Attributes:
        images: calibration examples to take means over.

    Raises:
        InputError: a value is not valid.
    """

    when: ClassVar[Literal["before", "after"]] = "after"

    images: int = 256

    def __post_init__(self) -> None:
        check(counts={"images": self.images})

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """See :class:`~slimkit.quantize.methods.interface.Method`."""
        streams = Streams(work, self.images)
        total = len(streams.layers)
        with work.display(total, "bias_correction") as display:
            for number, layer in enumerate(streams.layers, start=1):
                largest = max(
                    (_correct(bias, shift) for bias, shift in _shifts(work, streams, layer)),
                    default=0.0,
                )
                display.step(number, f"{layer.module}: largest shift {largest:.3g}")


def _correct(bias: nn.Parameter, shift: Tensor) -> float:
    bias.sub_(shift)
    return float(shift.abs().max())


def _shifts(
    work: Work, streams: Streams, layer: RoundedLayer
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The biases of a layer, each with the mean of (quantized − float) of its channels."""
    quantizer = work.quantized.quantizers[layer.weight.name]
    shifts: dict[int, list[Tensor]] = {}
    biases: dict[int, nn.Parameter] = {}
    for rounded, exact in streams.calls(layer):
        if not isinstance(rounded.bias, nn.Parameter):
            continue
        shift = rounded.output(rounded.x, quantizer(rounded.weight)) - exact.output(
            exact.x, exact.weight
        )
        shifts.setdefault(id(rounded.bias), []).append(rounded.by_example(shift))
        biases[id(rounded.bias)] = rounded.bias
    for key, bias in biases.items():
        yield bias, reliable_mean(torch.cat(shifts[key]))
