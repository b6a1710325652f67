"""Group Fisher: what the loss says of masks that all readers of a channel share.

Every layer that reads a channel of a group has its input multiplied by the channel's mask, one
number per sample that is 1. The derivative of a sample's loss with respect to it is the sum,
over all members and positions, of activation times gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.functions import function_name
from slimkit.inputs import Batch
from slimkit.prune.batches import (
    Batches,
    Loss,
    each_batch,
    evaluated_copy,
    loss_of,
    samples_of,
)
from slimkit.prune.criteria.gradients import not_prepared
from slimkit.prune.criteria.scores import Criterion, FixedScores, check_choice

if TYPE_CHECKING:
    from slimkit.graph.groups import Group, Slot

__all__ = ["ChannelMasks", "GroupFisher", "Saving"]

Saving = Literal["macs", "activations"]
"""What a channel costs: multiply-accumulates, or elements of the activations that layers make."""

_UNIT: dict[Saving, float] = {"macs": 1e9, "activations": 1e6}
"""Units in which the paper counts what a channel costs: GMACs, millions of elements."""


@door
@dataclass(frozen=True, eq=False)
class GroupFisher:
    """Fisher information of a channel's shared mask (Liu et al. 2021, "Group Fisher Pruning").

    The score is Σ over the samples of (∂loss/∂mask)², eq. 3, divided by what one channel
    costs, section 3.4: by 10⁹ MACs or by 10⁶ elements of activations. All channels of a group
    cost the same, so that matters where groups are compared (a ranking over all groups by
    scores as they are).

    Attributes:
        batches, loss: see :mod:`slimkit.prune.batches`.
        normalise: by which cost; None for none.
        max_batches: look at so many batches; None for all.
    """

    batches: Batches = field(repr=False)
    loss: Loss = field(repr=False)
    normalise: Saving | None = "macs"
    max_batches: int | None = None

    def __post_init__(self) -> None:
        if self.normalise is not None:
            check_choice(self.normalise, Saving, where="normalise")

    def prepare(self, model: nn.Module, groups: Sequence[Group]) -> Criterion:
        """Score ``groups`` on the batches.

        Where a layer mixes samples into another dimension (attention over tokens that come
        first), each sample is run alone.

        Raises:
            InputError, DataError: no batches, a batch of another form, a loss that is not
                finite, no scalar, or does not depend on the channels.
        """
        with evaluated_copy(model, self.loss) as twin:
            masks = ChannelMasks(twin, groups)
            totals = sum(
                masks.slopes(batch, self.loss).double().square().sum(dim=0).cpu()
                for batch in each_batch(self.batches, model, self.max_batches)
            )
        scores, reasons = {}, {}
        for group in groups:
            saved = 1.0 if self.normalise is None else masks.saved(group, self.normalise)
            if group.name not in masks.read:
                reasons[group.name] = "no layer was seen that reads these channels"
            elif not saved:
                reasons[group.name] = f"without one of these channels no {self.normalise} are saved"
            else:
                assert isinstance(totals, Tensor)
                scores[group.name] = totals[masks.columns(group)] / saved
        return FixedScores(scores, reasons, type(self).__name__)

    def __call__(self, group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
        """Not before :meth:`prepare`."""
        raise not_prepared(self)


class ChannelMasks(AddressMode):
    """A mode in which every layer that reads channels of groups sees them through masks.

    Args:
        model: in evaluation mode.
        groups: whose channels are masked.

    Attributes:
        alive: one number per channel of all groups, what its mask is: 1 or 0.
        read: names of the groups that a layer was seen to read.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        super().__init__(model)
        self._model = model
        named = dict(model.named_parameters())
        self._first: dict[str, int] = {}
        self._places: dict[str, list[tuple[str, Slot]]] = {}
        total = 0
        for group in groups:
            self._first[group.name] = total
            total += group.size
            for slot in group.slots:
                self._places.setdefault(slot.tensor, []).append((group.name, slot))
        self._names = {id(named[name]): name for name in self._places if name in named}
        self._shapes = {name: tuple(named[name].shape) for name in self._names.values()}
        device = next((p.device for p in named.values()), torch.device("cpu"))
        self.alive = torch.ones(total, device=device)
        self.read: set[str] = set()
        self._macs: dict[str, float] = {}
        self._made: dict[str, float] = {}
        self._counting = True
        self._together = True
        self._mixed = False
        self._masks = torch.ones(1, 1 + total, device=device)
        self._indices: dict[tuple[str, int], Tensor | None] = {}

    def columns(self, group: Group) -> slice:
        """Where the channels of ``group`` are among those of all groups."""
        first = self._first[group.name]
        return slice(first, first + group.size)

    def hide(self, group: str, channel: int) -> None:
        """The mask of a channel is 0 from now on: the network computes what it would without."""
        self.alive[self._first[group] + channel] = 0.0

    def slopes(self, batch: Batch, loss: Loss) -> Tensor:
        """∂(loss of a sample)/∂(mask of a channel), shape ``(samples, channels)``."""
        count = batch.size or 1
        if self._together:
            found = self._slopes(batch, loss, count)
            if not self._mixed:
                return found * count  # of each sample's own loss, not of the mean
            self._together = False
        return torch.cat([self._slopes(part, loss, 1) for part in samples_of(batch)])

    def trained(self, batch: Batch, loss: Loss, optimizer: Any) -> Tensor:
        """Like :meth:`slopes`, and a step of ``optimizer`` on the same gradients.

        Raises:
            InputError: a layer mixes samples into another dimension.
        """
        optimizer.zero_grad()
        count = batch.size or 1
        value = self._value(batch, loss, count)
        if self._mixed:
            raise InputError(
                "the samples of a batch cannot be told apart inside of this network",
                where="optimizer",
                hint="leave it out: each sample is then run alone, and the weights stay",
            )
        torch.autograd.backward([value])
        optimizer.step()
        assert self._masks.grad is not None
        return self._masks.grad[:, 1:] * count

    def saved(self, group: Group, saving: Saving) -> float:
        """What one channel of ``group`` costs, in 10⁹ MACs or 10⁶ elements per sample."""
        left: dict[str, float] = {}
        for slot in group.slots:
            if slot.tensor in self._shapes and (saving == "macs" or slot.role == "producer"):
                stays = 1.0 - slot.width / self._shapes[slot.tensor][slot.dim]
                left[slot.tensor] = left.get(slot.tensor, 1.0) * stays
        costs = self._macs if saving == "macs" else self._made
        gone = sum(costs.get(name, 0.0) * (1.0 - part) for name, part in left.items())
        return gone / _UNIT[saving]

    def _value(self, batch: Batch, loss: Loss, count: int) -> Tensor:
        """The loss, seen through one mask per sample."""
        start = torch.cat([self.alive.new_ones(1), self.alive])
        self._masks = start.expand(count, -1).clone().requires_grad_(True)
        self._mixed = False
        with self:
            value = loss_of(self._model, batch, loss)
        self._counting = False
        return value

    def _slopes(self, batch: Batch, loss: Loss, count: int) -> Tensor:
        value = self._value(batch, loss, count)
        if self._mixed:
            return self._masks.detach()
        found: Tensor | None
        (found,) = torch.autograd.grad(value, [self._masks], allow_unused=True)
        if found is None:
            raise InputError("the loss does not depend on the model's channels", where="loss")
        return found[:, 1:]

    def on_call(
        self,
        address: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Mask what a layer reads."""
        layer = _LAYERS.get(function_name(func))
        operands = None if layer is None else layer.operands(args, kwargs)
        if layer is None or operands is None:
            return func(*args, **kwargs)
        x, weight = operands
        name = self._names.get(id(weight))
        if name is None:
            return func(*args, **kwargs)
        masked = self._masked(x, name, layer, layer.groups(args, kwargs))
        args = tuple(masked if arg is x else arg for arg in args)
        result = func(*args, **{k: masked if v is x else v for k, v in kwargs.items()})
        if self._counting:
            samples = len(self._masks)
            macs = layer.macs(x, weight, result)
            self._macs[name] = self._macs.get(name, 0.0) + macs / samples
            self._made[name] = self._made.get(name, 0.0) + result.numel() / samples
        return result

    def _masked(self, x: Tensor, name: str, layer: _WeightReader, groups: int) -> Tensor:
        axis = layer.axis(x, self._shapes[name])
        index = self._index(name, layer, groups, x.shape[axis])
        if index is None:
            return x
        masks = self._masks
        shape = [1] * x.dim()
        if len(masks) > 1:
            others = [size for dim, size in enumerate(x.shape) if dim not in (0, axis)]
            clear = layer.kind in _CONVOLUTIONS or len(masks) not in others
            if axis > 0 and x.shape[0] == len(masks) and clear:
                shape[0] = len(masks)
            else:  # this run is not used; what comes behind must go on all the same
                self._mixed = True
                masks = masks[:1]
        shape[axis] = x.shape[axis]
        return x * masks[:, index].reshape(shape).to(x.dtype)

    def _index(self, name: str, layer: _WeightReader, groups: int, channels: int) -> Tensor | None:
        """For each input channel the column of its mask; 0 for those that have none."""
        key = (name, groups)
        if key not in self._indices:
            index = np.zeros(channels, dtype=np.int64)
            for group, slot in self._places[name]:
                places = _read(slot, self._shapes[name], layer.kind, groups)
                if places is not None:
                    self.read.add(group)
                    first = 1 + self._first[group]
                    index[places] = np.arange(first, first + len(places))[:, None]
            found = torch.from_numpy(index).to(self.alive.device) if index.any() else None
            self._indices[key] = found
        return self._indices[key]


_CONVOLUTIONS = ("convolution", "transposed")
"""Kinds of :class:`_WeightReader` whose input has its channels before the spatial dimensions."""


@dataclass(frozen=True)
class _WeightReader:
    """How a torch function reads a weight.

    Attributes:
        kind: ``"convolution"``, ``"transposed"``, ``"linear"`` (weight ``(out, in)``) or
            ``"product"`` (weight ``(in, out)``).
        positions: of the input and of the weight among the arguments.
        names: of the same.
    """

    kind: str
    positions: tuple[int, int] = (0, 1)
    names: tuple[str, str] = ("input", "weight")

    def operands(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Input and weight."""
        found = [
            args[position] if position < len(args) else kwargs.get(name)
            for position, name in zip(self.positions, self.names, strict=True)
        ]
        x, weight = found
        if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dim() > 1:
            return x, weight
        return None

    def groups(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Of a convolution; 1 for others."""
        if self.kind not in _CONVOLUTIONS:
            return 1
        return int(args[6] if len(args) > 6 else kwargs.get("groups", 1))

    def axis(self, x: Tensor, weight: Sequence[int]) -> int:
        """The dimension of the input that holds channels."""
        return x.dim() - (len(weight) - 1 if self.kind in _CONVOLUTIONS else 1)

    def macs(self, x: Tensor, weight: Tensor, result: Tensor) -> int:
        """Multiply-accumulates of one call."""
        if self.kind in _CONVOLUTIONS:
            moved = x if self.kind == "transposed" else result
            return moved.numel() * math.prod(weight.shape[1:])
        return result.numel() * weight.shape[-1 if self.kind == "linear" else -2]


_LAYERS = {
    **{f"conv{rank}d": _WeightReader("convolution") for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _WeightReader("transposed") for rank in (1, 2, 3)},
    "linear": _WeightReader("linear"),
    "matmul": _WeightReader("product", names=("input", "other")),
    "mm": _WeightReader("product", names=("input", "mat2")),
    "addmm": _WeightReader("product", positions=(1, 2), names=("mat1", "mat2")),
}
"""Name of a torch function → how it reads its weight."""


_READ_BY = {"convolution": 1, "transposed": 0, "linear": 1, "product": -2}
"""Kind of layer → the dimension of the weight that runs along the input's channels."""


def _read(slot: Slot, shape: Sequence[int], kind: str, groups: int) -> NDArray[np.int64] | None:
    """The input channels that belong to each channel of the slot's group, ``(size, n)``.

    None where the slot's dimension is not one that the layer reads by.
    """
    size = len(slot.positions)
    if slot.dim == _READ_BY[kind] % len(shape):
        if kind != "convolution" or groups == 1:
            return slot.positions
        starts = shape[1] * np.arange(groups)  # the same positions of every group of inputs
        return (slot.positions[:, :, None] + starts).reshape(size, -1)
    if kind != "convolution" or slot.dim != 0 or groups == 1:
        return None
    # Depthwise and the like: output block i is computed from input block i, and both go.
    width = shape[0] // groups
    if slot.width % width:
        return None
    blocks = (slot.positions // width).reshape(size, -1, width)
    if (blocks != blocks[:, :, :1]).any():
        return None
    return (blocks[:, :, :1] * shape[1] + np.arange(shape[1])).reshape(size, -1)
