"""Sparse training: terms of the loss that make whole groups of weights fall, before pruning.

Both are terms for :func:`slimkit.train.fit` (``losses=[GroupLasso(model, images)]``) and for a
loop of your own (``loss = loss + term(model)``). They are part of the loss, not added to the
gradients, so that gradient scaling, clipping, several processes and the logged loss treat them
like any other term; they keep nothing between steps. Prune afterwards by the criterion that
looks at what fell: ``"group_l2"`` or ``"bn_scale"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.graph.capturing import capture_both_modes
from slimkit.graph.grouping import dependency_groups
from slimkit.graph.groups import AttentionPart, Group, Slot
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.graph.unseen import protected_values, unseen_parts
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.prune.criteria.scores import weight_slots

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["BatchNormL1", "GroupLasso"]


@door
class GroupLasso:
    """Σ over channels of √n·‖all n weights of the channel in its group‖₂.

    The weights of a channel are those that compute it, scale it and read it, as far as they
    are trained; biases are not. With ``growth`` channels that are small already are pushed
    harder: by 2^(growth·(I_max − I)/(I_max − I_min)), where I is the squared norm of a channel
    and the extremes are those of its group (Fang et al. 2023, "DepGraph", section 3.3, with 4).

    Args:
        model: the network that is trained.
        example_inputs: to find its groups; see :class:`slimkit.Inputs`.
        weight: of the term.
        growth: 0 for the plain group lasso.
        ignore: patterns of layers whose output channels are left alone.
        attention: as it will be for :func:`slimkit.prune.plan`.

    Raises:
        InputError: weight or growth is negative.
        PlanError: nothing can be pruned.
        CaptureError, PatternError: as for :func:`slimkit.prune.plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weight: float = 1e-4,
        *,
        growth: float = 0.0,
        ignore: Pattern | Iterable[Pattern] = (),
        attention: AttentionPart | None = None,
    ) -> None:
        self.weight = _not_negative(weight, "weight")
        self.growth = _not_negative(growth, "growth")
        groups = _prunable(model, example_inputs, ignore, attention)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._channels = _Channels(model, [(g, weight_slots(g, tensors)) for g in groups])

    def __call__(self, source: StepContext | nn.Module) -> Tensor:
        """The term, a scalar, for a model or for a step of :func:`slimkit.train.fit`.

        Raises:
            InputError: the model has other layers than the one it was made for.
        """
        channels = self._channels
        squares = channels.sums(_model_of(source), torch.square)
        # The derivative of a root is infinite at 0: a channel that is gone shall stay there.
        norms = (squares + 1e-12).sqrt() * channels.counts(squares.device).sqrt()
        if self.growth:
            norms = norms * 2.0 ** (self.growth * channels.distance_to_largest(squares.detach()))
        return self.weight * norms.sum()

    def sparsity(self, threshold: float = 1e-3) -> float:
        """The share of channels whose weights have a root mean square below ``threshold``."""
        with torch.no_grad():
            squares = self._channels.sums(self._channels.model, torch.square)
            sizes = (squares / self._channels.counts(squares.device)).sqrt()
        return float((sizes < threshold).float().mean())


@door
class BatchNormL1:
    """Σ|γ| over the batch norms of channels that can go (Liu et al. 2017, "Network Slimming").

    Args:
        model: the network that is trained.
        example_inputs: to find its groups; see :class:`slimkit.Inputs`.
        weight: of the term; the paper uses 1e-5 to 1e-4.
        ignore: patterns of layers whose output channels are left alone.

    Raises:
        InputError: the weight is negative.
        PlanError: no batch normalization scales channels that can be pruned.
        CaptureError, PatternError: as for :func:`slimkit.prune.plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        weight: float = 1e-4,
        *,
        ignore: Pattern | Iterable[Pattern] = (),
    ) -> None:
        self.weight = _not_negative(weight, "weight")
        norms = {
            f"{path}.weight" if path else "weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        }
        scaled = [
            (group, [slot for slot in group.slots if slot.tensor in norms])
            for group in _prunable(model, example_inputs, ignore)
        ]
        if not any(slots for _, slots in scaled):
            raise PlanError(
                f"no batch normalization of {type(model).__name__} scales channels that can go",
                where="model",
                hint="use GroupLasso",
            )
        self._channels = _Channels(model, [(group, slots) for group, slots in scaled if slots])

    def __call__(self, source: StepContext | nn.Module) -> Tensor:
        """The term, a scalar, for a model or for a step of :func:`slimkit.train.fit`.

        Raises:
            InputError: the model has other layers than the one it was made for.
        """
        return self.weight * self._channels.sums(_model_of(source), torch.abs).sum()

    def sparsity(self, threshold: float = 1e-2) -> float:
        """The share of channels whose |γ| is below ``threshold``, in the mean of their norms."""
        with torch.no_grad():
            sizes = self._channels.sums(self._channels.model, torch.abs)
            sizes = sizes / self._channels.counts(sizes.device)
        return float((sizes < threshold).float().mean())


class _Channels:
    """Where the trained weights of each channel lie, as flat indices: no loop over channels.

    The sums over all but one dimension of every tensor are laid end to end; ``positions`` are
    those of the first channel in that vector, then those of the second, and so on.
    """

    def __init__(self, model: nn.Module, members: Sequence[tuple[Group, Sequence[Slot]]]) -> None:
        self.model = model
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._dims: dict[str, dict[int, int]] = {}  # tensor → dimension → start in the vector
        self._shapes: dict[str, tuple[int, ...]] = {}
        positions, owners, elements, group_of = [], [], [], []
        length = total = 0
        for number, (group, slots) in enumerate(members):
            for slot in (slot for slot in slots if slot.tensor in trained):
                shape = self._shapes[slot.tensor] = tuple(trained[slot.tensor].shape)
                starts = self._dims.setdefault(slot.tensor, {})
                if slot.dim not in starts:
                    starts[slot.dim] = length
                    length += shape[slot.dim]
                positions.append((starts[slot.dim] + slot.positions).ravel())
                owners.append(total + np.repeat(np.arange(group.size), slot.width))
                each = int(np.prod(shape)) // shape[slot.dim]
                elements.append(np.full(slot.positions.size, each))
            group_of.append(np.full(group.size, number))
            total += group.size
        if not positions:
            raise PlanError("none of the weights that could go are trained", where="model")
        owner, position = np.concatenate(owners), np.concatenate(positions)
        counts = np.bincount(owner, np.concatenate(elements), minlength=total)
        held = counts > 0  # groups of frozen layers have no trained weights
        places = np.bincount(owner, minlength=total)[held]
        self._tensors = {
            "positions": torch.from_numpy(position[np.argsort(owner, kind="stable")]),
            "places": torch.from_numpy(places),
            "counts": torch.from_numpy(counts[held]).float(),
            "group": torch.from_numpy(np.concatenate(group_of)[held]),
        }

    def sums(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Σ ``function(weight)`` over the weights of each channel, ``(channels,)``."""
        parts = []
        for name, dims in self._dims.items():
            weight = self._parameter(model, name)
            value = function(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            for dim in dims:
                others = [d for d in range(value.dim()) if d != dim]
                parts.append((dims[dim], value.sum(dim=others) if others else value))
        flat = torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])])
        chosen = flat[self._on(flat.device, "positions")]
        # In segments, because adding by index has no fixed order on a GPU: runs must repeat.
        places = self._on(flat.device, "places")
        return torch.segment_reduce(chosen, "sum", lengths=places, unsafe=True)

    def counts(self, device: torch.device) -> Tensor:
        """How many weights each channel has."""
        return self._on(device, "counts")

    def distance_to_largest(self, sizes: Tensor) -> Tensor:
        """(largest − size) / (largest − smallest) within each group, 0 … 1."""
        group = self._on(sizes.device, "group")
        ends = []
        for reduce in ("amax", "amin"):
            empty = sizes.new_zeros(int(group[-1]) + 1)
            ends.append(empty.scatter_reduce(0, group, sizes, reduce, include_self=False)[group])
        largest, smallest = ends
        return (largest - sizes) / (largest - smallest).clamp_min(1e-12)

    def _on(self, device: torch.device, name: str) -> Tensor:
        if self._tensors[name].device != device:
            self._tensors = {key: tensor.to(device) for key, tensor in self._tensors.items()}
        return self._tensors[name]

    def _parameter(self, model: nn.Module, name: str) -> Tensor:
        try:
            found = model.get_parameter(name)
        except AttributeError as error:
            raise InputError(
                f"it has no parameter {name!r}",
                where="model",
                hint="give the model that this term was made for, not a wrapper around it",
            ) from error
        if tuple(found.shape) != self._shapes[name]:
            raise InputError(
                f"{name} has shape {tuple(found.shape)}, and had {self._shapes[name]} when this "
                "term was made",
                where="model",
                hint="make a new one after pruning",
            )
        return found


def _prunable(
    model: nn.Module,
    example_inputs: ExampleInputs,
    ignore: Pattern | Iterable[Pattern],
    attention: AttentionPart | None = None,
) -> list[Group]:
    ignored = match_modules(model, ignore, where="ignore")
    captured = capture_both_modes(model, as_inputs(example_inputs))  # what plan() will see
    protected = protected_values(unseen_parts(model, captured), captured)
    groups = dependency_groups(captured.both, model, attention, protected)
    found = [
        group
        for group in groups
        if group.frozen_reason is None and not ignored & set(group.producers)
    ]
    if not found:
        raise PlanError(f"no channels of {type(model).__name__} can be pruned", where="model")
    return found


def _model_of(source: StepContext | nn.Module) -> nn.Module:
    return source if isinstance(source, nn.Module) else source.model


def _not_negative(value: float, where: str) -> float:
    if not value >= 0:
        raise InputError(f"expected a number ≥ 0, got {value!r}", where=where)
    return float(value)
