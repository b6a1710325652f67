"""What goes on with a pruned network: optimizers, masks, networks of the same structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimkit.errors import InputError, PlanError, nearest
from slimkit.plan import apply
from slimkit.prune.optimizer_state import following as optimizer_following

if TYPE_CHECKING:
    from slimkit.prune.edits import PrunePlan

__all__ = ["following"]


def following(
    plan: PrunePlan, model: nn.Module, companion: Any, where: str
) -> Callable[[nn.Module], None]:
    """Check that ``companion`` can go on with the pruned model; return what makes it so.

    Args:
        plan: not applied yet.
        model: not pruned yet.
        companion: an optimizer, tensors by name, or a network of the same structure.
        where: what an error names.

    Returns:
        To be called with the pruned model.

    Raises:
        InputError: it is nothing that could follow.
        PlanError: it does not fit.
    """
    if companion is model:
        raise InputError("this is the model itself", where=where, hint="it is pruned anyway")
    if isinstance(companion, Mapping):
        return _tensors(plan, model, companion, where)
    if isinstance(companion, nn.Module):
        return _network(plan, companion, where)
    inside = getattr(companion, "optimizer", None)
    if where == "optimizer" or isinstance(companion, Optimizer) or isinstance(inside, Optimizer):
        return optimizer_following(plan, model, companion)
    raise InputError(
        f"{type(companion).__name__} is nothing that follows a plan",
        where=where,
        hint="an optimizer, a dictionary of tensors by name, a module, or an object with "
        "follow(plan)",
    )


def _tensors(
    plan: PrunePlan, model: nn.Module, tensors: Mapping[str, Any], where: str
) -> Callable[[nn.Module], None]:
    """Masks and whatever else is kept per parameter: sliced like the parameter."""
    if not isinstance(tensors, MutableMapping):
        raise InputError(
            f"the entries of a {type(tensors).__name__} cannot be replaced",
            where=where,
            hint="give a dictionary",
        )
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    first = {id(tensor): name for name, tensor in reversed(named.items())}  # of tied ones
    sliced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in named:
            raise PlanError(
                f"the model has no {name!r}", where=f"{where}.{name}", hint=nearest(name, named)
            )
        if not torch.is_tensor(tensor) or not _fits(tensor, named[name]):
            found = f"shape {tuple(tensor.shape)}" if torch.is_tensor(tensor) else type(tensor)
            raise PlanError(
                f"expected a tensor of shape {tuple(named[name].shape)}, got {found}",
                where=f"{where}.{name}",
            )
        sliced[name] = plan.slice_state(first[id(named[name])], tensor)

    def follow(_: nn.Module) -> None:
        tensors.update(sliced)

    return follow


def _fits(tensor: Tensor, parameter: Tensor) -> bool:
    return tensor.dim() == parameter.dim() and all(
        own in {1, size} for own, size in zip(tensor.shape, parameter.shape, strict=True)
    )


def _network(plan: PrunePlan, network: nn.Module, where: str) -> Callable[[nn.Module], None]:
    """A second network of the same structure: the plan is applied to it, too."""
    from torch.optim.swa_utils import AveragedModel

    inner = network.module if isinstance(network, AveragedModel) else network
    assert isinstance(inner, nn.Module)
    try:
        plan.check(inner)
    except PlanError as error:
        raise PlanError(error.message, where=f"{where}.{error.where}", hint=error.hint) from error

    def follow(_: nn.Module) -> None:
        apply(inner, plan)

    return follow
