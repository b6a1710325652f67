"""Coupled channels as values: groups that are pruned together, and their slots in tensors.

:func:`slimkit.graph.grouping.dependency_groups` finds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = ["ATTENTION", "AttentionPart", "Group", "Slot", "SlotRole"]

AttentionPart = Literal["heads", "channels"]
"""What of an attention leaves where both could: whole heads, or channels of every head."""

ATTENTION: tuple[AttentionPart, ...] = get_args(AttentionPart)

SlotRole = Literal["producer", "consumer", "vector", "size"]
"""What a tensor's dimension does for a channel: ``"producer"`` makes it (output dimension of
a convolution's weight), ``"consumer"`` reads it (input dimension), ``"vector"`` holds one
number per channel (bias, batch-norm scale and statistics, layer scale). ``"size"`` is no tensor
but a whole number that a module keeps (``num_heads``); its name has a colon for the last dot."""


@dataclass(frozen=True, eq=False)
class Slot:
    """The places that a group's channels occupy in one dimension of one tensor.

    Attributes:
        tensor: name of the parameter or buffer (the first of tied names), or of an attribute:
            ``"blocks.0.attn:num_heads"``.
        dim: the dimension.
        role: see :data:`SlotRole`.
        positions: integers of shape ``(size, width)``: row ``i`` holds the indices along
            ``dim`` that belong to channel ``i`` of the group. ``width`` is 1 for most
            layers, 49 for a linear layer behind a flattened 7×7 map, the number of groups
            for a grouped convolution.
    """

    tensor: str
    dim: int
    role: SlotRole
    positions: npt.NDArray[np.int64]

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        path, colon, _ = self.tensor.partition(":")
        return path if colon else self.tensor.rpartition(".")[0]

    @property
    def width(self) -> int:
        """Positions per channel."""
        return int(self.positions.shape[1])

    def __str__(self) -> str:
        size, width = self.positions.shape
        return f"{self.tensor}[dim {self.dim}] {self.role}, {size} × {width}"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that are alike: each can leave on its own, with its places in every slot.

    Several groups may have slots in the same dimension of a tensor (a convolution whose
    output is split in two); what is kept there is what none of them removes.

    Attributes:
        name: path of the first module that makes the channels (``"layer1.0.conv1"``), with
            ``":2"``, ``":3"`` … where one module makes the channels of several groups;
            ``"conv1 input"`` where no module makes them.
        size: the number of channels that can be removed independently; at least one stays.
        slots: all places in tensors, in order of execution.
        frozen_reason: why none can be removed, in plain language; ``None`` if they can.
        link: groups with the same link must keep equal fractions of their channels, though
            each chooses its own: a transformer's width and its heads, whose product must stay
            equal. ``None`` for most groups.
        sizes: places in whole-number attributes that count the channels (``num_heads``).
        attributes: (module path, attribute, value) of numbers that shrink by the same fraction
            without counting these very channels (``embed_dim``).
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    frozen_reason: str | None = None
    link: str | None = None
    sizes: tuple[Slot, ...] = ()
    attributes: tuple[tuple[str, str, int], ...] = ()

    @property
    def width(self) -> int:
        """Output channels of the naming layer that leave with one channel of the group."""
        return self.slots[0].width

    @property
    def producers(self) -> tuple[str, ...]:
        """Paths of the modules whose output shrinks."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "producer"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Paths of the modules whose input shrinks."""
        return tuple(dict.fromkeys(s.module for s in self.slots if s.role == "consumer"))

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all modules that own a slot."""
        return tuple(dict.fromkeys(s.module for s in self.slots))

    def __str__(self) -> str:
        head = f"{self.name}: {self.size} channels"
        if self.width > 1:
            head += f" of {self.width}"
        if self.frozen_reason is not None:
            head += f", kept because {self.frozen_reason}"
        return "\n".join([head, *(f"  {slot}" for slot in self.slots)])
