"""Dimensions that a file leaves open: who names them, whether the network really does.

``dynamic_axes`` is what ``torch.onnx.export`` calls it: input → {dimension: name}. Dimensions of
one name have one size. The exporter keeps every one of them symbolic; what it cannot tell, whether
another operator would have run for another size, is tried out with the finished file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slimkit.errors import BackendError, ExportError, InputError, nearest
from slimkit.runtime.structure import FlatModel

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto

    from slimkit.runtime.sessions import Session

__all__ = [
    "Axes",
    "DynamicAxes",
    "checked_axes",
    "fixed",
    "name_axes",
    "specialized",
    "symbolic",
    "try_out",
]

DynamicAxes = Mapping[str, Mapping[int, str]] | Sequence[str]
"""Input → {dimension: name}, or names out of :data:`USUAL` alone."""
Axes = dict[int, dict[int, str]]
"""Position of a tensor among the inputs → {dimension ≥ 0: name}."""
BATCH = "batch"
USUAL = {BATCH: (0, ()), "sequence": (1, (2, 3)), "height": (-2, (4,)), "width": (-1, (4,))}
"""Name → the dimension that it means, in inputs of so many dimensions (any for the batch)."""
_FLOAT_DB, _ROUGH_DB = 40.0, 10.0
"""Least SQNR in dB of the file against the network at another size: rounding stays far above, a
wrong operator far below. The rough one is for quantized files and half precision."""
_SILENCE = 1e-6
"""Least mean square of an output that noise is compared with: outputs may all be zero."""


def checked_axes(
    given: DynamicAxes | None, names: Sequence[str], tensors: Sequence[Tensor], batched: list[int]
) -> Axes:
    """Every dimension that stays open.

    Args:
        given: the user's.
        names: of the inputs.
        tensors: the example's.
        batched: positions whose dimension 0 is the batch, if that is to stay open.

    Raises:
        InputError: an unknown input or name, a dimension that is not there, or one name for
            dimensions of different sizes.
    """
    axes: Axes = {}
    if isinstance(given, Mapping):
        for name, entry in given.items():
            if name not in names:
                raise InputError(
                    f"there is no input {name!r}", where="dynamic_axes", hint=nearest(name, names)
                )
            position = names.index(name)
            axes[position] = _one_input(f"dynamic_axes.{name}", entry, tensors[position])
    elif given is not None:
        axes = _usual(given, tensors)
    first = next((axes[i][0] for i in batched if 0 in axes.get(i, {})), BATCH)
    for position in batched:
        axes.setdefault(position, {}).setdefault(0, first)
    sizes: dict[str, tuple[int, str]] = {}
    for position, entry in axes.items():
        for axis, label in entry.items():
            size, owner = tensors[position].shape[axis], names[position]
            known, other = sizes.setdefault(label, (size, owner))
            if size != known:
                raise InputError(
                    f"{label!r} is {known} in {other} and {size} in {owner}",
                    where="dynamic_axes",
                    hint="dimensions of one name have one size",
                )
    return {position: dict(sorted(axes[position].items())) for position in sorted(axes)}


def _one_input(where: str, entry: Any, tensor: Tensor) -> dict[int, str]:
    if not isinstance(entry, Mapping):
        raise InputError(
            f"expected {{dimension: name}}, got {entry!r}", where=where, hint='{0: "batch"}'
        )
    found = {}
    for axis, label in entry.items():
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise InputError(
                f"there is no dimension {axis!r}", where=where, hint=f"0 to {tensor.dim() - 1}"
            )
        if not isinstance(label, str) or not label.isidentifier():
            raise InputError(f"expected a name, got {label!r}", where=f"{where}.{axis}")
        found[axis % tensor.dim()] = label
    return found


def _usual(given: Any, tensors: Sequence[Tensor]) -> Axes:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(
            f"expected input → {{dimension: name}} or a list of names, got {given!r}",
            where="dynamic_axes",
            hint='{"input": {2: "height", 3: "width"}}',
        )
    axes: Axes = {}
    for label in given:
        if label not in USUAL:
            raise InputError(
                f"a list has the usual names only, not {label!r}",
                where="dynamic_axes",
                hint=f'{nearest(str(label), USUAL)} or {{"input": {{2: "{label}"}}}}',
            )
        axis, ranks = USUAL[label]
        fitting = [i for i, t in enumerate(tensors) if t.dim() and (not ranks or t.dim() in ranks)]
        if not fitting:
            raise InputError(f"no input has a {label}", where="dynamic_axes")
        size = tensors[fitting[0]].shape[axis]
        for i in fitting:
            if tensors[i].shape[axis] == size:
                axes.setdefault(i, {})[axis % tensors[i].dim()] = label
    return axes


def symbolic(tensors: Sequence[Tensor], axes: Axes) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Example tensors and ``dynamic_shapes`` for ``torch.export.export``.

    A dimension of size 1 becomes 2: one would be taken for a constant.
    """
    dynamic = torch.export.Dim.DYNAMIC
    larger = list(tensors)
    for position, entry in axes.items():
        for axis in entry:
            if tensors[position].shape[axis] == 1:
                larger[position] = _resized(larger[position], axis, 2)
    shapes = (dict.fromkeys(axes[i], dynamic) if i in axes else None for i in range(len(tensors)))
    return tuple(larger), tuple(shapes)


def specialized(message: str, names: Sequence[str], axes: Axes) -> tuple[str, str, str] | None:
    """(dimension, input, size) that the tracer found to be a constant, read from its message."""
    for line in message.splitlines():
        found = re.search(r"\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\].*constant \((\d+)\)", line)
        if found:
            position, axis = int(found[1]), int(found[2])
            label = axes.get(position, {}).get(axis)
            if label is not None and position < len(names):
                return label, names[position], found[3]
    return None


def name_axes(proto: ModelProto, names: Sequence[str], axes: Axes) -> None:
    """Call the symbols of the open dimensions by their names everywhere.

    Raises:
        ExportError: one became a constant, or two of different names are the same.
    """
    inputs = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.input}
    symbols: dict[str, str] = {}
    for position, entry in axes.items():
        for axis, label in entry.items():
            dims = inputs[names[position]]
            if axis >= len(dims) or not dims[axis].dim_param:
                raise fixed(label, names[position])
            known = symbols.setdefault(dims[axis].dim_param, label)
            if known != label:
                raise ExportError(
                    f"the network takes them as one size: {known} and {label}",
                    where=f"dynamic_axes.{names[position]}",
                    hint="give both one name",
                )
    for value in [*proto.graph.input, *proto.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r"\bs\d+\b", lambda found: symbols.get(found[0], found[0]), dim.dim_param
                )


def fixed(label: str, owner: str, size: str = "") -> ExportError:
    """The error for a dimension that the network does not leave open."""
    if label == BATCH:
        return ExportError(
            "its forward works for one batch size only: it turns the batch into a fixed number",
            where=owner,
            hint="use dynamic_batch=False, or -1 and tensor.shape[0] in place of the number",
        )
    return ExportError(
        f"the network works for one {label} only{f', {size}' if size else ''}",
        where=owner,
        hint=f"leave {label} out of dynamic_axes, or give its modules other sizes to work with",
    )


def try_out(
    path: Path, flat: FlatModel, tensors: Sequence[Tensor], axes: Axes, *, rough: bool
) -> None:
    """Run the file and the network at a larger and a smaller size of every named dimension.

    The batch alone is not tried: no network decides by it. Sizes that the network itself refuses
    are left out; the values are those of the example, repeated or cut.

    Args:
        path: the file.
        flat: the network, in evaluation mode.
        tensors: the example's.
        axes: what stays open.
        rough: only gross differences count: quantized values, half precision.

    Raises:
        ExportError: the file fails or answers something else; names the dimension and the size.
    """
    from slimkit.runtime.sessions import open_session

    labels = {label: (i, axis) for i, entry in axes.items() for axis, label in entry.items()}
    others = {label: place for label, place in labels.items() if label != BATCH}
    if not others:
        return
    try:
        session = open_session(path)
    except BackendError:  # no kernel for these types here, so nothing can be tried
        return
    for label, (position, axis) in others.items():
        size = tensors[position].shape[axis]
        tried = 0
        for choices in ((2 * size, size + size // 2, size + 1), (size // 2, size - 1)):
            for other in (n for n in choices if n > 1):
                changed = [
                    _all_resized(t, axes.get(i, {}), label, other) for i, t in enumerate(tensors)
                ]
                expected = _answers(flat, changed)
                if expected is None:
                    continue
                _compare(session, changed, expected, f"{label} {other}", rough)
                tried += 1
                break
        if not tried:
            raise fixed(label, session.input_names[position], str(size))


def _all_resized(tensor: Tensor, entry: Mapping[int, str], label: str, size: int) -> Tensor:
    for axis, name in entry.items():
        if name == label:
            tensor = _resized(tensor, axis, size)
    return tensor


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Repeated or cut along ``axis``: every value stays one that the network knows."""
    places = torch.arange(size, device=tensor.device) % tensor.shape[axis]
    return tensor.index_select(axis, places)


def _answers(flat: FlatModel, tensors: Sequence[Tensor]) -> list[NDArray[Any]] | None:
    """What the network answers; None where it refuses the sizes."""
    try:
        with torch.no_grad():
            return [t.detach().float().cpu().numpy() for t in flat(*(t.clone() for t in tensors))]
    except Exception:  # a user's forward may raise anything
        return None


def _compare(
    session: Session, tensors: Sequence[Tensor], expected: list[NDArray[Any]], at: str, rough: bool
) -> None:
    try:
        answers = session.run([tensor.detach().cpu().numpy() for tensor in tensors])
    except (BackendError, InputError) as error:
        raise ExportError(f"the file fails at {at}: {error}", where="dynamic_axes") from error
    for name, want, got in zip(session.output_names, expected, answers, strict=True):
        if want.shape != got.shape:
            raise ExportError(
                f"at {at} {name} is {want.shape} in the network and {got.shape} in the file",
                where="dynamic_axes",
                hint="its forward decides something by this size",
            )
        noise = _power(np.nan_to_num(want) - np.nan_to_num(got))
        signal = max(_power(want), _SILENCE * want.size)
        decibels = 10 * math.log10(signal / noise) if noise else math.inf
        if decibels < (_ROUGH_DB if rough else _FLOAT_DB):
            raise ExportError(
                f"at {at} the file answers something else than the network in {name} "
                f"({decibels:.0f} dB)",
                where="dynamic_axes",
                hint="its forward decides something by this size",
            )


def _power(values: NDArray[Any]) -> float:
    return float(np.square(np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)).sum())
