"""The mask plan: which weights are zero, as a value that is saved, explained and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from slimkit.errors import PlanError, nearest
from slimkit.plan import Plan

__all__ = ["MaskPlan", "pack_bits", "unpack_bits"]


@dataclass(frozen=True, eq=False)
class MaskPlan(Plan):
    """Weights that are zero: a mask (True = stays) for each sparse parameter.

    Attributes:
        masks: name of a parameter → boolean tensor of its shape, on the CPU.
        skipped: name of each other weight → why it stays dense.
        notes: what a person should know, such as rows that kept one weight.
        settings: how the masks were made; for people.
    """

    kind: ClassVar[str] = "mask"
    version: ClassVar[int] = 1

    masks: Mapping[str, Tensor]
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights that have a mask."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(total, 1)

    def to_json(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "weights": {
                name: {"shape": list(mask.shape), "nonzero": int(mask.sum())}
                for name, mask in self.masks.items()
            },
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The masks, one bit a weight."""
        return {name: pack_bits(mask) for name, mask in self.masks.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MaskPlan:
        """See the base class.

        Raises:
            PlanError: masks are missing, or have other sizes or counts than the plan says.
        """
        masks = {}
        for name, entry in data["weights"].items():
            shape = entry["shape"]
            if not all(isinstance(n, int) and n > 0 for n in shape):
                raise PlanError(f"{shape} is no shape of a weight", where=name)
            packed = tensors.get(name)
            size = int(np.prod(shape, dtype=np.int64))
            if packed is None or packed.dtype != torch.uint8 or packed.numel() != -(-size // 8):
                raise PlanError("its mask is missing or has another size", where=name)
            masks[name] = unpack_bits(packed, shape)
            if int(masks[name].sum()) != entry["nonzero"]:
                raise PlanError("its mask is damaged: another number of weights stays", where=name)
        return cls(masks, dict(data["skipped"]), tuple(data["notes"]), dict(data["settings"]))

    def explain(self) -> str:
        """Every weight with its sparsity, and what stays dense and why."""
        total = sum(mask.numel() for mask in self.masks.values())
        zeros = total - sum(int(mask.sum()) for mask in self.masks.values())
        lines = [f"{zeros:,} of {total:,} weights in {len(self.masks)} layers become zero"]
        lines[0] += f" ({self.sparsity:.1%})"
        width = max((len(name) for name in [*self.masks, *self.skipped]), default=0)
        for name, mask in self.masks.items():
            share = 1 - int(mask.sum()) / mask.numel()
            shape = "×".join(map(str, mask.shape))
            lines.append(f"  {name:<{width}}  {share:7.2%} zero of {mask.numel():,} ({shape})")
        lines += [f"  {name:<{width}}  dense: {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def check(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters that have a mask, by name.

        Raises:
            PlanError: the model has no such parameter, or one of another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.masks.items():
            if name not in parameters:
                raise PlanError(
                    f"{type(model).__name__} has no such parameter",
                    where=name,
                    hint=nearest(name, parameters),
                )
            if parameters[name].shape != mask.shape:
                raise PlanError(
                    f"the mask is for a weight of {tuple(mask.shape)}, this one has "
                    f"{tuple(parameters[name].shape)}",
                    where=name,
                    hint="apply plans in the order in which they were made",
                )
        return {name: parameters[name] for name in self.masks}

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> nn.Module:
        """Set the weights to zero; see :func:`slimkit.apply`."""
        for name, parameter in self.check(model).items():
            parameter.masked_fill_(~self.masks[name].to(parameter.device), 0)
        return model

    def follow(
        self, model: nn.Module, companion: Any, *, where: str = "companions"
    ) -> Callable[[nn.Module], None]:
        """Shapes stay, so that optimizers go on as they are; a network gets the same zeros."""
        if isinstance(companion, nn.Module):
            self.check(companion)
            return lambda _: _ignored(self.apply_to(companion))
        if isinstance(companion, torch.optim.Optimizer):
            return _ignored
        return super().follow(model, companion, where=where)


def _ignored(_: object) -> None:
    """What there is nothing to do with."""


def pack_bits(mask: Tensor) -> Tensor:
    """Eight entries of a boolean tensor to a byte, the first in the highest bit: (⌈n/8⌉,)."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack_bits(packed: Tensor, shape: Any) -> Tensor:
    """The inverse of :func:`pack_bits` for a tensor of ``shape``."""
    size = int(np.prod(tuple(shape), dtype=np.int64))
    bits = np.unpackbits(packed.cpu().numpy().reshape(-1), count=size)
    return torch.from_numpy(bits.astype(bool)).view(*shape)
