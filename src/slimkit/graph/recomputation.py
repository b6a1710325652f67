"""Activation checkpointing: parts of a training forward that are computed again in backward.

``torch.utils.checkpoint`` does not keep the activations of a module; backward runs the module
once more, outside of the forward that a mode surrounds. Without the mode it would compute
another function, silently with wrong gradients. So the forward notes which runs are inside of a
checkpoint, and when one of these modules runs during backward, the mode is entered for it.
A module of several runs is told apart by the memory of its first argument.
"""

from __future__ import annotations

import sys
import threading
import weakref
from types import CodeType, FrameType
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn

from slimkit.errors import AddressError
from slimkit.graph.addressing import AddressMode
from slimkit.graph.module_hooks import (
    hold_hooks,
    module_paths,
    release_hooks,
    tensors_in_arguments,
    when_unfollowed,
)

__all__ = ["Recomputable", "inside_checkpoint", "note_run", "region"]

_MOST_RUNS = 64
"""Noted per module; the oldest go. Each forward before a backward adds one per run."""


class Recomputable(Protocol):
    """A module around ``model`` that may be trained with checkpointing."""

    @property
    def model(self) -> nn.Module:
        """What runs under a mode."""

    def recomputation(self) -> AddressMode:
        """The mode for a part of a forward that is computed again."""


_Place = tuple[int, tuple[int, ...]] | None
"""Where a tensor is in memory, and its shape."""

_LOCK = threading.Lock()
_RUNS: weakref.WeakKeyDictionary[Any, dict[str, dict[_Place, str]]] = weakref.WeakKeyDictionary()
"""Owner → path of a module → place of its first argument → label of the run."""


def note_run(owner: Recomputable, path: str, label: str, args: tuple[Any, ...]) -> None:
    """The module at ``path`` runs inside of a checkpoint.

    Args:
        owner: a module; it is forgotten when it is gone.
        path: of the module that runs, in ``owner.model``.
        label: of the run.
        args: its positional arguments.
    """
    with _LOCK:
        runs = _RUNS.get(owner)
        if runs is None:
            _RUNS[owner] = runs = {}
            hold_hooks()
            weakref.finalize(owner, release_hooks)
        places = runs.setdefault(path, {})
        while len(places) >= _MOST_RUNS:
            del places[next(iter(places))]
        places[_place(args)] = label


def _resume(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Enter the mode for a module that runs in backward; it is left with the module."""
    if not _RUNS or torch._C._current_graph_task_id() == -1:
        return
    with _LOCK:
        owners = list(_RUNS.items())
    for owner, runs in owners:
        found = module_paths(owner.model).get(id(module.__dict__))
        places = None if found is None else runs.get(found[1])
        if found is not None and places:
            label = _label(found[1], places, args)
            mode: AddressMode = owner.recomputation()
            mode.enter_alone(module, args, label)
            return


def _label(path: str, places: dict[_Place, str], args: tuple[Any, ...]) -> str:
    label = places.get(_place(args))
    if label is None:
        labels = set(places.values())
        if len(labels) > 1:
            raise AddressError(
                f"it ran {len(labels)} times, and it cannot be told which of these backward "
                "computes again",
                where=path,
                hint="give each checkpoint a module of its own",
            )
        (label,) = labels
    return label


def _place(args: tuple[Any, ...]) -> _Place:
    first = next(tensors_in_arguments(args), None)
    if first is None:
        return None
    with torch._C.DisableTorchFunction():  # hooks run under the mode: this would be a call
        return first.data_ptr(), tuple(first.shape)


def region() -> Any:
    """What a checkpoint changes: gradients are off, or activations are kept in another way."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return torch.is_grad_enabled(), None if hooks is None else id(hooks[0])


def _code_of(holder: Any, name: str) -> set[CodeType]:
    """The code of a function, if there is one of that name: these are private to torch."""
    code = getattr(getattr(holder, name, None), "__code__", None)
    return {code} if isinstance(code, CodeType) else set()


_CHECKPOINTS = _code_of(torch_checkpoint.CheckpointFunction, "forward") | _code_of(
    torch_checkpoint, "_checkpoint_impl"
)
"""What torch runs something in without keeping activations: reentrant, and not."""


def inside_checkpoint() -> bool:
    """Whether this is called, however deep, from inside of ``torch.utils.checkpoint``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CHECKPOINTS:
            return True
        frame = frame.f_back
    return False


when_unfollowed(_resume)
