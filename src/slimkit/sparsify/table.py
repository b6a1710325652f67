"""How sparse each layer of a network is."""

from __future__ import annotations

from torch import nn

from slimkit.doors import structure_door

__all__ = ["sparsity_table"]


@structure_door
def sparsity_table(model: nn.Module) -> list[dict[str, object]]:
    """Every weight of two or more dimensions with its zeros.

    Returns:
        Rows in the order of the network: ``name``, ``shape``, ``weights``, ``zeros`` (counts) and
        ``sparsity`` (fraction of zeros, 0 … 1).
    """
    rows: list[dict[str, object]] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        zeros = int((parameter.detach() == 0).sum())
        rows.append(
            {
                "name": name,
                "shape": list(parameter.shape),
                "weights": parameter.numel(),
                "zeros": zeros,
                "sparsity": zeros / max(parameter.numel(), 1),
            }
        )
    return rows
