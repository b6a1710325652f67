"""Packed sparse weights: only the values that are not zero, and where they stand.

A safetensors file in which a sparse tensor ``NAME`` is two tensors: ``NAME.values`` in the order
of the flattened weight, and its places in one of three forms, whichever is smallest:

* ``NAME.bitmap``: one bit a weight, the first in the highest bit of a byte;
* ``NAME.delta4`` and ``NAME.delta8``: distances between neighbours, less one, in 4 bits (the
  first in the high half of a byte) or 8. A distance that is too large is bridged by a value 0.

Tensors that would not get smaller are there as they are. The metadata entry ``slimkit_packed`` is
a JSON object: format, SHA-256 of all tensors, and shape and number of values of each packed one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimkit.artifact import PathLike, parse_json, read_tensors, tensors_hash, write_tensors
from slimkit.errors import ArtifactError, InputError

__all__ = ["pack_tensor", "read_packed", "unpack_tensor", "write_packed"]

FORMAT = 1
_KEY = "slimkit_packed"
_FORMS = ("bitmap", "delta4", "delta8")
_PACKED_TYPES = (torch.float32, torch.int8)
"""What sparse runtimes compute with. Zeros of half-precision weights are not packed: Paddle
Lite's sparse kernels, which this form serves as well, know float32 and int8 alone."""
Array = np.ndarray[Any, Any]


def write_packed(path: PathLike, state: Mapping[str, Tensor]) -> dict[str, float]:
    """Write tensors with their zeros left out.

    Args:
        path: of the file, ``.safetensors``; written as a whole or not at all.
        state: by name, as from ``state_dict()``; float32 and int8 tensors are packed where that
            makes them smaller, integers and small tensors are stored as they are.

    Returns:
        Name of each packed tensor → its bytes as a fraction of its dense ones.

    Raises:
        InputError: a sparse tensor is float16 or bfloat16.
        ArtifactError: the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    fractions: dict[str, float] = {}
    for name, tensor in state.items():
        parts = pack_tensor(tensor, where=name)
        if parts is None:
            stored[name] = tensor
            continue
        stored |= {f"{name}.{kind}": part for kind, part in parts.items()}
        described[name] = {"shape": list(tensor.shape), "values": parts["values"].numel()}
        fractions[name] = _bytes(parts.values()) / (tensor.numel() * tensor.element_size())
    clash = sorted(name for name in described if name in stored)
    if clash:
        raise InputError("two tensors would have this name in the file", where=clash[0])
    description = {"format": FORMAT, "sha256": tensors_hash(stored), "packed": described}
    write_tensors(path, stored, {_KEY: json.dumps(description, sort_keys=True)})
    return fractions


def read_packed(path: PathLike) -> dict[str, Tensor]:
    """Read what :func:`write_packed` wrote, dense again: the same values at the same places.

    Raises:
        ArtifactError: the file is missing, cut off, changed, or of a newer version.
    """
    stored = read_tensors(path)
    description = _description(path)
    if tensors_hash(stored) != description.get("sha256"):
        raise ArtifactError("it is not what was saved: damaged, or changed since", where=str(path))
    state: dict[str, Tensor] = {}
    packed = description["packed"]
    for name, entry in packed.items():
        parts = {
            kind: stored.pop(f"{name}.{kind}")
            for kind in ("values", *_FORMS)
            if f"{name}.{kind}" in stored
        }
        if "values" not in parts or parts["values"].numel() != entry["values"]:
            raise ArtifactError(f"the values of {name} are missing", where=str(path))
        state[name] = unpack_tensor(parts, entry["shape"], where=f"{path}: {name}")
    return {**stored, **state}


def pack_tensor(tensor: Tensor, *, where: str = "tensor") -> dict[str, Tensor] | None:
    """Values and places of a tensor, by kind; None if that is not smaller than the tensor.

    Raises:
        InputError: it is sparse, and float16 or bfloat16.
    """
    if tensor.dim() < 2 or not tensor.numel():
        return None
    if tensor.dtype not in _PACKED_TYPES:
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        if half and int((tensor == 0).sum()) * 2 > tensor.numel():
            raise InputError(
                f"sparse weights of {str(tensor.dtype).removeprefix('torch.')} are not packed",
                where=where,
                hint="float32 or int8: what sparse runtimes compute with",
            )
        return None
    flat: Array = tensor.detach().cpu().reshape(-1).numpy()
    places = np.flatnonzero(flat)
    forms = [_bitmap(flat, places), _deltas(flat, places, 4), _deltas(flat, places, 8)]
    smallest = min(forms, key=lambda parts: _bytes(parts.values()))
    if _bytes(smallest.values()) >= flat.nbytes:
        return None
    return smallest


def unpack_tensor(parts: Mapping[str, Tensor], shape: Any, *, where: str = "tensor") -> Tensor:
    """The inverse of :func:`pack_tensor`.

    Args:
        parts: ``values`` and one of the forms of places.
        shape: of the dense tensor.
        where: what an error names.

    Raises:
        ArtifactError: they do not belong together.
    """
    size = _size(shape, where)
    values: Array = parts["values"].numpy().reshape(-1)
    found = [form for form in _FORMS if form in parts]
    if len(found) != 1:
        raise ArtifactError("its places are missing", where=where)
    codes: Array = parts[found[0]].numpy().reshape(-1)
    if codes.dtype != np.uint8:
        raise ArtifactError("its places are no bytes", where=where)
    if found[0] == "bitmap":
        fits = codes.size == -(-size // 8)
        places = np.flatnonzero(np.unpackbits(codes, count=size)) if fits else np.empty(0)
    else:
        if found[0] == "delta4":
            codes = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[: values.size]
        places = np.cumsum(codes.astype(np.int64) + 1) - 1
        fits = codes.size == values.size and (not places.size or places[-1] < size)
    if not fits or places.size != values.size:
        raise ArtifactError("values and places do not belong together", where=where)
    dense = np.zeros(size, values.dtype)
    dense[places] = values
    return torch.from_numpy(dense).view(*shape)


def _bitmap(flat: Array, places: Array) -> dict[str, Tensor]:
    return {
        "values": torch.from_numpy(flat[places].copy()),
        "bitmap": torch.from_numpy(np.packbits(flat != 0)),
    }


def _deltas(flat: Array, places: Array, bits: int) -> dict[str, Tensor]:
    base = 1 << bits
    steps = np.diff(places, prepend=-1)
    bridges = (steps - 1) // base
    ends = np.cumsum(bridges + 1) - 1  # where each value stands among values and bridges
    total = int(ends[-1]) + 1 if ends.size else 0
    codes = np.full(total, base - 1, np.uint8)
    codes[ends] = steps - bridges * base - 1
    values = np.zeros(total, flat.dtype)
    values[ends] = flat[places]
    if bits == 4:
        even = np.append(codes, np.zeros(total % 2, np.uint8)).reshape(-1, 2)
        codes = (even[:, 0] << 4 | even[:, 1]).astype(np.uint8)
    return {"values": torch.from_numpy(values), f"delta{bits}": torch.from_numpy(codes)}


def _bytes(tensors: Any) -> int:
    return sum(int(tensor.numel() * tensor.element_size()) for tensor in tensors)


def _size(shape: Any, where: str) -> int:
    """Number of elements; a shape that no file of this size can have is refused."""
    sound = isinstance(shape, list | tuple) and all(isinstance(n, int) and n > 0 for n in shape)
    size = 1
    for length in shape if sound else ():
        size *= length
    if not sound or size > 1 << 33:
        raise ArtifactError(f"{shape!r} is no shape of a weight", where=where)
    return size


def _description(path: PathLike) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(Path(path)), framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise ArtifactError("these are no packed weights", where=str(path), hint="read_tensors")
    try:
        description = parse_json(text, str(path))
        version = description["format"]
        entries = description["packed"].values()
        sound = isinstance(version, int) and all({"shape", "values"} <= e.keys() for e in entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("its description is damaged", where=str(path)) from error
    if not sound:
        raise ArtifactError("its description is damaged", where=str(path))
    if version > FORMAT:
        raise ArtifactError(
            f"packed weights of format {version}, this library reads up to {FORMAT}",
            where=str(path),
            hint="update slimkit",
        )
    return dict(description)
