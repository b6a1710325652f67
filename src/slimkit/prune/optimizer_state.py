"""Pruning in the middle of training: what an optimizer remembers of a weight shrinks with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from slimkit.errors import InputError, PlanError

if TYPE_CHECKING:
    from slimkit.prune.edits import PrunePlan

__all__ = ["following", "unwrapped"]


def following(plan: PrunePlan, model: nn.Module, optimizer: Any) -> Callable[[nn.Module], None]:
    """Check that ``optimizer`` can go on with the pruned model; return what makes it so.

    Momentum, second moments and whatever else has the shape of a parameter is sliced like
    the parameter; step counts stay. The parameters are replaced in the optimizer's groups,
    whose settings stay; those of other models stay too. What is remembered in another shape
    (Adafactor's rows and columns) starts anew for that parameter, with a warning.

    Args:
        plan: not applied yet.
        model: not pruned yet.
        optimizer: of PyTorch, or one that wraps it as ``.optimizer`` (Accelerate, Lightning).

    Returns:
        To be called with the pruned model.

    Raises:
        InputError: it is no optimizer, or none of this model.
        PlanError: it keeps the parameters in a way that cannot be sliced.
    """
    inner = unwrapped(optimizer)
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    if not any(id(parameter) in trained for parameter in named.values()):
        raise InputError(
            f"it trains none of the parameters of this {type(model).__name__}",
            where="optimizer",
            hint="give the optimizer that was made for this model",
        )
    moved = {
        name: named[name]
        for name in dict.fromkeys(edit.tensor for edit in plan.edits)
        if name in named and id(named[name]) in trained
    }
    anew = list(_not_sliceable(inner, moved))

    def follow(pruned: nn.Module) -> None:
        after = {id(old): pruned.get_parameter(name) for name, old in moved.items()}
        for name, old in moved.items():
            state = inner.state.pop(old, None)
            if state and name not in anew:
                inner.state[after[id(old)]] = {
                    key: plan.slice_state(name, value) if _is_like(value, old) else value
                    for key, value in state.items()
                }
        for group in inner.param_groups:
            group["params"] = [after.get(id(p), p) for p in group["params"]]
        if anew:
            shown = ", ".join(anew[:3]) + (f" and {len(anew) - 3} more" if len(anew) > 3 else "")
            warnings.warn(
                f"{type(inner).__name__} remembers {shown} in another shape: it starts anew there",
                stacklevel=3,
            )

    return follow


def unwrapped(optimizer: Any) -> Optimizer:
    """The PyTorch optimizer inside.

    Raises:
        InputError: there is none.
    """
    found = optimizer
    while isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    if not isinstance(found, Optimizer):
        raise InputError(
            f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}", where="optimizer"
        )
    return found


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _not_sliceable(optimizer: Optimizer, moved: Mapping[str, nn.Parameter]) -> Iterator[str]:
    """Names of parameters of which something is remembered in another shape."""
    if isinstance(optimizer, LBFGS):
        raise PlanError(
            "LBFGS keeps all parameters as one vector, which cannot be sliced",
            where="optimizer",
            hint="make a new optimizer after pruning",
        )
    for name, parameter in moved.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, list | tuple | dict) and value:
                raise PlanError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} for {name} as "
                    f"{key!r}, which cannot be sliced",
                    where="optimizer",
                    hint="make a new optimizer after pruning",
                )
            if torch.is_tensor(value) and value.numel() != 1 and not _is_like(value, parameter):
                yield name
                break
