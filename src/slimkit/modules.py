"""What every room does with a user's module: evaluation mode for a while, and copies of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimkit.errors import ModelError
from slimkit.locking import one_at_a_time

__all__ = ["Evaluate", "copy_module", "evaluation", "restored_flags", "set_evaluation"]

Module = TypeVar("Module", bound=nn.Module)

Evaluate = Callable[[nn.Module], float]
"""A network in evaluation mode → how good it is on validation data; higher is better."""


def set_evaluation(model: Module) -> Module:
    """``model.eval()``, for modules too whose mode was fixed when they were exported.

    What ``torch.export.export(…).module()`` returns raises NotImplementedError there: its
    operators are in the mode in which they were traced, and stay as they are.

    Returns:
        The model itself.
    """
    try:
        model.eval()
    except NotImplementedError:
        model.training = False
        for child in model.children():
            set_evaluation(child)
    return model


@contextlib.contextmanager
def restored_flags(model: nn.Module) -> Iterator[None]:
    """Every module's own ``training`` flag is afterwards what it was before."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own ``training`` flag is restored afterwards."""
    with restored_flags(model):
        set_evaluation(model)
        yield


def copy_module(model: Module, *, where: str = "model") -> Module:
    """A deep copy of ``model`` that shares nothing with it.

    Tensors that hang on a computation and are held outside parameters and buffers are copied
    without it: the weight that ``torch.nn.utils.weight_norm`` computes anew in every forward, an
    activation that the last forward kept as an attribute. ``copy.deepcopy`` refuses them.

    Args:
        model: any module, not changed.
        where: what an error calls it, such as ``teacher``.

    Raises:
        ModelError: something else in it cannot be copied, such as a lock or an open file; names
            module and attribute.
    """
    try:
        with one_at_a_time(), _DetachedCopies():  # no copy of what a capture has changed for now
            return copy.deepcopy(model)
    except Exception as error:  # a user's own __deepcopy__ may raise anything
        raise _not_copied(model, where, error) from error


class _DetachedCopies(TorchFunctionMode):
    """While it is on, ``copy.deepcopy`` of a tensor with a ``grad_fn`` gives a leaf."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def _not_copied(model: nn.Module, where: str, error: Exception) -> ModelError:
    """The error that names the attribute of the innermost module that does not copy."""
    place, hint = where, "give its class a __deepcopy__"
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules" and not _copies(value):
                place = ".".join(part for part in (where, path, name) if part)
                hint = "make it in forward, set it to None before, or give its class a __deepcopy__"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return ModelError(f"it cannot be copied: {reason}", where=place, hint=hint)


def _copies(value: object) -> bool:
    try:
        with _DetachedCopies(), torch.no_grad():
            copy.deepcopy(value)
    except Exception:  # a user's own __deepcopy__ may raise anything
        return False
    return True
