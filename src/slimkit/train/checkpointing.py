"""The state of an unfinished training run: one safetensors file with JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimkit.artifact import read_tensors, write_tensors
from slimkit.errors import ArtifactError, CheckpointError
from slimkit.train.ema import WeightAverage

__all__ = ["RunState", "restore", "save_run"]

_FORMAT = "slimkit-training-1"


@dataclass
class RunState:
    """Everything that a run carries from epoch to epoch.

    Attributes:
        model, optimizer, average: the trained things; no average without EMA.
        extras: losses and callbacks; those with ``state_dict()`` are part of the state.
        extra_parameters: trained parameters outside of the model.
        identity: settings, seed and sizes; only a run with an equal one may go on from here.
        header: epochs done, steps done, history, chosen precision (JSON).
    """

    model: nn.Module
    optimizer: Optimizer
    average: WeightAverage | None
    extras: Sequence[object]
    extra_parameters: Sequence[nn.Parameter]
    identity: dict[str, Any]
    header: dict[str, Any]


def save_run(path: Path, state: RunState) -> None:
    """Write the state, atomically.

    Raises:
        ArtifactError: the folder is not writable or the disk is full.
    """
    tensors = {f"model/{name}": t for name, t in state.model.state_dict().items()}
    numbers: dict[str, Any] = {}
    for index, entry in state.optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    if state.average is not None:
        tensors |= {f"average/{name}": t for name, t in state.average.average.items()}
    tensors |= {f"parameter/{i}": p for i, p in enumerate(state.extra_parameters)}
    for index, extra in enumerate(state.extras):
        tensors |= {f"extra/{index}/{name}": t for name, t in _state_of(extra).items()}
    header = {
        "format": _FORMAT,
        "identity": state.identity,
        "header": state.header,
        "optimizer": numbers,
        "average_steps": state.average.steps if state.average else 0,
    }
    write_tensors(path, tensors, {"slimkit": json.dumps(header)})


def restore(path: Path, state: RunState) -> bool:
    """Bring a run back to where ``path`` left it; ``state.header`` is filled in.

    Returns:
        False when there is no such file.

    Raises:
        CheckpointError: it belongs to a run with other settings or another model.
        ArtifactError: it is not a checkpoint of a training run.
    """
    if not path.exists():
        return False
    header = _read_header(path)
    if header["identity"] != state.identity:
        differing = [
            key
            for key in {*header["identity"], *state.identity}
            if header["identity"].get(key) != state.identity.get(key)
        ]
        raise CheckpointError(
            f"the checkpoint is of another run: {', '.join(sorted(differing))} differ",
            where=str(path),
            hint="delete it to start anew",
        )
    tensors = read_tensors(path)
    state.model.load_state_dict(_under(tensors, "model/"))
    _restore_optimizer(state.optimizer, _under(tensors, "optimizer/"), header["optimizer"])
    if state.average is not None:
        state.average.steps = header["average_steps"]
        for name, value in _under(tensors, "average/").items():
            state.average.average[name].copy_(value)
    with torch.no_grad():
        for index, parameter in enumerate(state.extra_parameters):
            parameter.copy_(tensors[f"parameter/{index}"])
    for index, extra in enumerate(state.extras):
        own = _under(tensors, f"extra/{index}/")
        if own and hasattr(extra, "load_state_dict"):
            extra.load_state_dict(own)
    state.header.update(header["header"])
    return True


@torch.no_grad()
def _restore_optimizer(
    optimizer: Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *numbers.items()]:
        number, _, key = name.partition("/")
        entries.setdefault(int(number), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in entries.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameters[index].shape:
                # the layout in memory decides how elements are rounded in vector units
                entry[key] = torch.empty_like(parameters[index]).copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _read_header(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["slimkit"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"not a checkpoint of a training run: {error}", where=str(path), hint="delete it"
        ) from error
    if header.get("format") != _FORMAT:
        raise ArtifactError(
            f"checkpoint format {header.get('format')!r}, expected {_FORMAT!r}",
            where=str(path),
            hint="delete it",
        )
    return header


def _state_of(extra: object) -> dict[str, Tensor]:
    """Tensors of a loss or a callback that keeps any."""
    getter = getattr(extra, "state_dict", None)
    if getter is None:
        return {}
    return {name: value for name, value in getter().items() if isinstance(value, Tensor)}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
