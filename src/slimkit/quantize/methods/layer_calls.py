"""Calls of convolutions and linear layers as matrix products.

At one output position a layer multiplies its weight with the patch of the input around it. A few
thousand patches from many images say how a layer answers as well as the whole images do, and a
matrix product of them is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SUPPORTED", "LayerCall", "grouped"]

SUPPORTED = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""Functions, as in call addresses."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        x: input, (N, C, *space) or (…, features).
        weight: (out, in / groups, *kernel) or (out, in).
        bias: (out,) or ``None``.
        stride, padding, dilation: one entry per dimension of space; empty for a linear layer.
            Padding is (before, after).
        groups: of channels.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def read(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall:
        """From the arguments of ``F.conv2d``, ``F.linear`` and the like."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        rank = weight.dim() - 2
        if rank == 0:
            return cls(x, weight, bias)
        stride, dilation = (_each(given.get(name, 1), rank) for name in ("stride", "dilation"))
        padding = given.get("padding", 0)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        else:
            sizes = _each(0 if padding == "valid" else padding, rank)
            pads = tuple((size, size) for size in sizes)
        if x.dim() == rank + 1:  # without a batch dimension
            x = x.unsqueeze(0)
        return cls(x, weight, bias, stride, pads, dilation, int(given.get("groups", 1)))

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of another input and another weight."""
        rank = len(self.stride)
        if not rank:
            return F.linear(x, weight, self.bias)
        if any(before != after for before, after in self.padding):
            x, pads = self._padded(x), [0] * rank
        else:
            pads = [before for before, _ in self.padding]
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return convolve(x, weight, self.bias, self.stride, pads, self.dilation, self.groups)

    def positions(self) -> int:
        """How many places, in all examples together, the weight is applied at."""
        if not self.stride:
            return self.x.numel() // self.x.shape[-1]
        return self.x.shape[0] * torch.Size(self._space()).numel()

    def examples(self, picks: Tensor) -> Tensor:
        """Which example each of these positions is of, (P,)."""
        return picks // max(1, self.positions() // self._count())

    def by_example(self, output: Tensor) -> Tensor:
        """The mean over the positions of every example: (N, C, *space) or (N, …, C) → (N, C)."""
        if self.stride:
            return output.flatten(2).mean(2)
        return output.reshape(self._count(), -1, output.shape[-1]).mean(1)

    def patches(self, x: Tensor, picks: Tensor) -> Tensor:
        """The inputs at some output positions.

        Args:
            x: like :attr:`x`.
            picks: numbers below :meth:`positions`, shape (P,).

        Returns:
            (groups, P, inputs of one output), in the order of ``weight.flatten(1)``.
        """
        if not self.stride:
            return x.reshape(-1, x.shape[-1])[picks].unsqueeze(0)
        x = self._padded(x)
        space, sizes = self._space(), x.shape[2:]
        example, index = picks // torch.Size(space).numel(), torch.zeros_like(picks)
        within = picks % torch.Size(space).numel()
        for axis, size in enumerate(space):
            below = torch.Size(space[axis + 1 :]).numel()
            place = within // below % size * self.stride[axis]
            index = index * sizes[axis] + place
        offsets = [0]
        for axis, kernel in enumerate(self.weight.shape[2:]):
            steps = [self.dilation[axis] * k for k in range(kernel)]
            offsets = [offset * sizes[axis] + step for offset, step in product(offsets, steps)]
        places = index.unsqueeze(1) + torch.tensor(offsets, device=picks.device)
        found = x.flatten(2)[example.unsqueeze(1), :, places]  # (P, kernel, C)
        shaped = found.reshape(len(picks), len(offsets), self.groups, -1)
        return shaped.permute(2, 0, 3, 1).flatten(2)

    def picked(self, output: Tensor, picks: Tensor) -> Tensor:
        """The outputs at some positions, (P, out)."""
        if not self.stride:
            return output.reshape(-1, output.shape[-1])[picks]
        flat = output.flatten(2)
        return flat[picks // flat.shape[2], :, picks % flat.shape[2]]

    def _count(self) -> int:
        """Of examples, which lie along the first dimension."""
        return self.x.shape[0] if self.stride or self.x.dim() > 1 else 1

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [size for pair in reversed(self.padding) for size in pair])

    def _space(self) -> tuple[int, ...]:
        """Height and width … of the output."""
        kernels = self.weight.shape[2:]
        return tuple(
            (size + sum(pads) - dilation * (kernel - 1) - 1) // stride + 1
            for size, pads, dilation, kernel, stride in zip(
                self.x.shape[2:], self.padding, self.dilation, kernels, self.stride, strict=True
            )
        )


def grouped(weight: Tensor, groups: int) -> Tensor:
    """A weight, output channels first, as (groups, out / groups, inputs of one output)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(int(v) for v in (values * rank if len(values) == 1 else values))
