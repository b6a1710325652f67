"""State dicts on disk, read so that loading never runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from slimkit.artifact import PathLike, read_tensors
from slimkit.doors import door
from slimkit.errors import ArtifactError, CheckpointError, nearest
from slimkit.plan import load_weights

__all__ = ["find_checkpoint", "load_checkpoint"]


_PICKLED = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts keep the state dict of the network."""


@runtime_checkable
class _Adapting(Protocol):
    def adapted_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]: ...


def find_checkpoint(path: PathLike) -> Path:
    """Where a checkpoint lies: ``path`` itself, or ``path`` under ``$SLIMKIT_CHECKPOINTS``.

    Raises:
        ArtifactError: it is in neither place.
    """
    given = Path(path).expanduser()
    root = os.environ.get("SLIMKIT_CHECKPOINTS")
    places = [given]
    if root and not given.is_absolute():
        places.append(Path(root).expanduser() / given)
    for place in places:
        if place.exists():
            return place
    looked = f", nor {places[1]}" if len(places) > 1 else ""
    hint = "put it there, or set SLIMKIT_CHECKPOINTS to the folder that holds your checkpoints"
    raise ArtifactError(f"there is no such file{looked}", where=str(path), hint=hint)


@door
def load_checkpoint(model: nn.Module, path: PathLike) -> nn.Module:
    """Load a safetensors state dict into ``model`` in place; every name and shape must fit.

    Args:
        model: the network to fill.
        path: a ``.safetensors`` file with the keys of ``model.state_dict()``, or a ``.pt`` or
            ``.pth`` file that holds them, alone or under ``state_dict``, ``model`` and the like;
            one that is not here is looked for under ``$SLIMKIT_CHECKPOINTS``. Keys that all start
            with ``module.`` (saved from DataParallel or DDP) are accepted. A model with a
            method ``adapted_checkpoint(tensors)`` may put its own weights in place of some: a
            detector those of its classes, where the file has another number of them.

    Returns:
        ``model``.

    Raises:
        CheckpointError: names or shapes that do not fit, or a file that holds more than tensors;
            the model is then unchanged.
        ArtifactError: the file is missing or cut off.
    """
    source = find_checkpoint(path)
    tensors = _read_pickled(source) if source.suffix in _PICKLED else read_tensors(source)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if isinstance(model, _Adapting):
        tensors = model.adapted_checkpoint(tensors)
    _check_fits(model.state_dict(), tensors, where=str(source))
    load_weights(model, tensors, where=str(source))
    return model


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote; nothing in it is run.

    Raises:
        CheckpointError: it holds objects that only running code could make, or no tensors.
        ArtifactError: it is cut off, or no such file.
    """
    import pickle

    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it holds more than tensors: objects that only running code could make",
            where=str(path),
            hint="save model.state_dict() alone, as safetensors or by torch.save",
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, … of damaged files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtifactError(
            f"not a complete file of torch.save: {reason}", where=str(path)
        ) from error
    for _ in range(2):  # {"epoch": 3, "state_dict": {"model": {…}}}
        inner = [held[key] for key in _WRAPPERS if isinstance(held, dict) and key in held]
        if not inner or not isinstance(inner[0], dict):
            break
        held = inner[0]
    others = [k for k, v in held.items() if not isinstance(v, Tensor)] if _is_state(held) else None
    if others is None or others:
        where_from = f"; it has {', '.join(map(str, others[:3]))}" if others else ""
        raise CheckpointError(
            f"it holds no state dict of tensors{where_from}",
            where=str(path),
            hint=f"a state dict alone, or under one of {', '.join(_WRAPPERS)}",
        )
    return {name: value.detach().clone() for name, value in held.items()}


def _is_state(held: object) -> bool:
    return isinstance(held, dict) and bool(held) and all(isinstance(name, str) for name in held)


def _check_fits(own: dict[str, Tensor], loaded: dict[str, Tensor], *, where: str) -> None:
    missing = [name for name in own if name not in loaded]
    # batch counters carry no knowledge: checkpoints of older tools leave them out
    for name in [name for name in missing if name.endswith("num_batches_tracked")]:
        loaded[name] = own[name]
        missing.remove(name)
    unexpected = [name for name in loaded if name not in own]
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"the model's {_some(missing)} not in the file")
        if unexpected:
            parts.append(f"the file's {_some(unexpected)} not in the model")
        hint = nearest(missing[0], unexpected) if missing and unexpected else None
        raise CheckpointError("; ".join(parts), where=where, hint=hint)
    for name, value in own.items():
        if value.shape != loaded[name].shape:
            raise CheckpointError(
                f"{name} is {tuple(loaded[name].shape)} in the file "
                f"and {tuple(value.shape)} in the model",
                where=where,
                hint="another number of classes or input channels, or another width?",
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
