"""State dicts on disk: safetensors only, so that loading never runs code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from slimkit.artifact import PathLike, read_tensors
from slimkit.errors import ArtifactError, CheckpointError, nearest
from slimkit.plan import load_weights

__all__ = ["find_checkpoint", "load_checkpoint"]


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


def load_checkpoint(model: nn.Module, path: PathLike) -> nn.Module:
    """Load a safetensors state dict into ``model`` in place; every name and shape must fit.

    Args:
        model: the network to fill.
        path: a ``.safetensors`` file with the keys of ``model.state_dict()``; one that is not
            here is looked for under ``$SLIMKIT_CHECKPOINTS``. Keys that all
            start with ``module.`` (saved from DataParallel or DDP) are accepted. A model with a
            method ``adapted_checkpoint(tensors)`` may put its own weights in place of some: a
            detector those of its classes, where the file has another number of them.

    Returns:
        ``model``.

    Raises:
        CheckpointError: a pickled file, or names or shapes that do not fit; the model is
            then unchanged.
        ArtifactError: the file is missing or cut off.
    """
    source = Path(path)
    if source.suffix in {".pt", ".pth", ".bin", ".ckpt", ".pkl"}:
        raise CheckpointError(
            "pickled checkpoints can run code when they are loaded and are not read",
            where=str(source),
            hint="convert once: safetensors.torch.save_file(torch.load(PATH, weights_only=True), "
            f"'{source.stem}.safetensors')",
        )
    tensors = read_tensors(find_checkpoint(source))
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if isinstance(model, _Adapting):
        tensors = model.adapted_checkpoint(tensors)
    _check_fits(model.state_dict(), tensors, where=str(source))
    load_weights(model, tensors, where=str(source))
    return model


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
