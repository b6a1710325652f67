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

from slimkit.artifact import parse_json, read_tensors, write_tensors
from slimkit.errors import ArtifactError, CheckpointError
from slimkit.plan import load_weights
from slimkit.train.ema import WeightAverage

__all__ = ["RunState", "check_state", "restore", "save_run"]

_FORMAT = "slimkit-training-2"


@dataclass
class RunState:
    """Everything that a run carries from epoch to epoch.

    Attributes:
        model, optimizer, average: the trained things; no average without EMA.
        extras: losses, callbacks and the like; what ``state_dict()`` of one returns, tensors
            or JSON by name, is part of the state.
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
        CheckpointError: something in it is neither a tensor nor JSON.
        ArtifactError: the folder is not writable or the disk is full.
    """
    own, plain = _parted(state.model)
    tensors = {f"model/{name}": t for name, t in own.items()}
    extras: dict[str, Any] = {}
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
        own, values = _parted(extra)
        tensors |= {f"extra/{index}/{name}": t for name, t in own.items()}
        if own or values:
            extras[str(index)] = {"class": type(extra).__name__, "values": values}
    header = {
        "format": _FORMAT,
        "identity": state.identity,
        "header": state.header,
        "optimizer": numbers,
        "model": plain,
        "extras": extras,
        "average_steps": state.average.steps if state.average else 0,
    }
    write_tensors(path, tensors, {"slimkit": json.dumps(header)})


def check_state(state: RunState) -> None:
    """Find out before the run, rather than after its first epoch, what cannot be kept.

    Raises:
        CheckpointError: something is neither a tensor nor JSON, or could not be given back.
    """
    _parted(state.model)
    for extra in state.extras:
        if any(_parted(extra)) and not hasattr(extra, "load_state_dict"):
            raise CheckpointError(
                "it has a state_dict(), but no load_state_dict() that takes it back",
                where=type(extra).__name__,
            )


def restore(path: Path, state: RunState) -> bool:
    """Bring a run back to where ``path`` left it; ``state.header`` is filled in.

    Returns:
        False when there is no such file.

    Raises:
        CheckpointError: it belongs to a run with other settings, another model or other
            callbacks.
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
    _check_classes(path, header["extras"], state.extras)
    tensors = read_tensors(path)
    load_weights(state.model, {**_under(tensors, "model/"), **header["model"]}, where=str(path))
    _restore_optimizer(state.optimizer, _under(tensors, "optimizer/"), header["optimizer"])
    if state.average is not None:
        state.average.steps = header["average_steps"]
        for name, value in _under(tensors, "average/").items():
            state.average.average[name].copy_(value)
    with torch.no_grad():
        for index, parameter in enumerate(state.extra_parameters):
            parameter.copy_(tensors[f"parameter/{index}"])
    for index, extra in enumerate(state.extras):
        kept = header["extras"].get(str(index))
        if kept is not None:
            loader: Any = extra
            loader.load_state_dict({**_under(tensors, f"extra/{index}/"), **kept["values"]})
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
            header: Any = parse_json((file.metadata() or {})["slimkit"], str(path))
    except (SafetensorError, OSError, KeyError, ValueError, ArtifactError) as error:
        raise ArtifactError(
            f"not a checkpoint of a training run: {error}", where=str(path), hint="delete it"
        ) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ArtifactError(
            f"it is no checkpoint of the format {_FORMAT!r}",
            where=str(path),
            hint="delete it",
        )
    return dict(header)


def _check_classes(path: Path, kept: dict[str, Any], extras: Sequence[object]) -> None:
    """Whoever has a state in the file is there to take it."""
    names = [type(extra).__name__ for extra in extras]
    for index, entry in kept.items():
        found = names[int(index)] if int(index) < len(names) else "nothing"
        if found != entry["class"]:
            raise CheckpointError(
                f"the checkpoint is of another run: it holds the state of {entry['class']}, "
                f"where this one has {found}",
                where=str(path),
                hint="pass the same losses and callbacks in the same order, or delete it",
            )


def _parted(owner: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``state_dict()`` returns, if there is one → tensors and JSON values by name.

    Raises:
        CheckpointError: a value is neither, or a name is no string.
    """
    getter = getattr(owner, "state_dict", None)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in getter().items() if callable(getter) else ():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(name, str) and _is_json(value):
            values[name] = value
        else:
            raise CheckpointError(
                f"{name!r} in its state is {_described(value)}: a checkpoint keeps tensors and "
                "JSON",
                where=type(owner).__name__,
                hint="return tensors, numbers, strings, lists, or dicts with strings as keys",
            )
    return tensors, values


def _is_json(value: object) -> bool:
    """Whether the value comes back from a file as it is: a tuple would come back a list."""
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def _described(value: object) -> str:
    """The type of a value, and of the first thing inside that is no JSON."""
    kind = type(value).__name__
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            return f"a {kind} with the key {odd!r}"
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    culprit = next((item for item in inside if not _is_json(item)), None)
    return f"a {kind}" if culprit is None else f"a {kind} that holds a {type(culprit).__name__}"


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
