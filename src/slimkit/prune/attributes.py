"""Sizes that modules keep as plain attributes, and what they become when tensors shrink."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

__all__ = ["ATTRIBUTE_RULES", "Kept", "new_attributes"]

Kept = Mapping[tuple[str, int], Sequence[int]]
"""(local tensor name, dimension) → positions that stay; dimensions that stay whole are absent."""


def _size(module: nn.Module, kept: Kept, tensor: str, dim: int) -> int:
    whole: int = getattr(module, tensor).shape[dim]
    return len(kept[tensor, dim]) if (tensor, dim) in kept else whole


def _blocks(positions: Sequence[int] | None, size: int, blocks: int) -> int:
    """How many of ``blocks`` equal parts of a dimension still have members."""
    if positions is None:
        return blocks
    return len({position // (size // blocks) for position in positions})


def _convolution(module: nn.Module, kept: Kept) -> dict[str, Any]:
    assert isinstance(module, _ConvNd)
    grouped_dim = 0  # the dimension that runs through all groups; the other is per group
    groups = _blocks(
        kept.get(("weight", grouped_dim)), module.weight.shape[grouped_dim], module.groups
    )
    through, per_group = _size(module, kept, "weight", 0), _size(module, kept, "weight", 1) * groups
    inputs, outputs = (through, per_group) if module.transposed else (per_group, through)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _linear(module: nn.Module, kept: Kept) -> dict[str, Any]:
    return {
        "in_features": _size(module, kept, "weight", 1),
        "out_features": _size(module, kept, "weight", 0),
    }


def _first_size(attribute: str) -> Callable[[nn.Module, Kept], dict[str, Any]]:
    """Modules with one size: that of dimension 0 of whichever tensor they have."""

    def rule(_module: nn.Module, kept: Kept) -> dict[str, Any]:
        sizes = {len(positions) for (_, dim), positions in kept.items() if dim == 0}
        return {attribute: sizes.pop()} if sizes else {}

    return rule


def _layer_norm(module: nn.Module, kept: Kept) -> dict[str, Any]:
    dims = len(getattr(module, "normalized_shape"))  # noqa: B009 - no common base class
    return {"normalized_shape": tuple(_size(module, kept, "weight", d) for d in range(dims))}


def _group_norm(module: nn.Module, kept: Kept) -> dict[str, Any]:
    assert isinstance(module, nn.GroupNorm)
    groups = _blocks(kept.get(("weight", 0)), module.num_channels, module.num_groups)
    return {"num_channels": _size(module, kept, "weight", 0), "num_groups": groups}


def _embedding(module: nn.Module, kept: Kept) -> dict[str, Any]:
    return {
        "num_embeddings": _size(module, kept, "weight", 0),
        "embedding_dim": _size(module, kept, "weight", 1),
    }


ATTRIBUTE_RULES: dict[type[nn.Module], Callable[[nn.Module, Kept], dict[str, Any]]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    _NormBase: _first_size("num_features"),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _first_size("num_parameters"),
    nn.Embedding: _embedding,
}
"""Module class → (module, what stays of its own tensors) → attributes after."""


def new_attributes(module: nn.Module, kept: Kept) -> dict[str, tuple[Any, Any]]:
    """The attributes of ``module`` that change: name → (before, after).

    Args:
        module: not pruned yet.
        kept: what stays of its own tensors; empty if nothing goes.
    """
    for base, rule in ATTRIBUTE_RULES.items():
        if isinstance(module, base):
            changed = {}
            for name, after in rule(module, kept).items():
                before = getattr(module, name)
                before = tuple(before) if isinstance(before, list | tuple) else before
                if before != after:
                    changed[name] = (before, after)
            return changed
    return {}
