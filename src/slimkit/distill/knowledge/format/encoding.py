"""Tensors as Arrow columns and back: all values, or top-k scores and the mean of the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from slimkit.distill.knowledge.format.schema import ID, KeySpec, KnowledgeSchema, check_schema
from slimkit.errors import DataError

__all__ = ["Columns", "arrays_of", "columns_of", "decode", "encode", "ids_of"]

Columns = dict[str, Tensor]
"""Name of a column → (N, width), a view of a file or of a received message: not to be changed."""

_TORCH = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64}


def encode(
    schema: KnowledgeSchema,
    ids: NDArray[np.int64],
    records: Mapping[str, Tensor],
    *,
    where: str = "teacher",
) -> pa.RecordBatch:
    """One record batch.

    Args:
        schema: what the keys are.
        ids: (N,) numbers of the samples.
        records: key → (N, …) as the network put it out; may be some of the keys only.
        where: whose knowledge it is, for errors.

    Raises:
        DataError: a record has another shape than announced, or is not finite.
    """
    names = [key.name for key in schema.keys if key.name in records]
    arrays: list[pa.Array] = [pa.array(ids, pa.int64())]
    for name in names:
        key = schema.key(name, where)
        record = records[name].detach()
        if tuple(record.shape) != (len(ids), *key.shape):
            raise DataError(
                f"{name} has shape {tuple(record.shape)}, announced were {len(ids)} samples of "
                f"{key.shape}",
                where=where,
            )
        arrays += arrays_of(key, record, where)
    return pa.RecordBatch.from_arrays(arrays, schema=schema.arrow(names))


def arrays_of(key: KeySpec, record: Tensor, where: str) -> list[pa.Array]:
    """The columns of one key.

    Raises:
        DataError: a value is not finite in the type of the key.
    """
    classes: Tensor | None = None
    if key.top_k is not None:
        record, classes = _largest(record.float(), key.top_k)
    stored = record.reshape(len(record), -1).to(_TORCH[key.dtype]).cpu().contiguous()
    if not _finite(stored):
        hint = "float16 ends at 65504: choose float32" if _finite(record) else None
        raise DataError(f"{key.name} is not finite in {key.dtype}", where=where, hint=hint)
    fields = key.fields()
    found = [_list(stored.numpy(), fields[0])]
    if classes is not None:
        found.append(_list(classes.to(torch.int32).cpu().contiguous().numpy(), fields[1]))
    return found


def _finite(values: Tensor) -> bool:
    """Whether all are; the extremes of a tensor are NaN where one of its values is."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # twenty times as fast as isfinite
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _list(values: NDArray[np.generic], field: pa.Field) -> pa.Array:
    flat = pa.array(values.reshape(-1), field.type.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest scores, then the one that the others share: (N, k + 1), and their classes.

    The shared score is the logarithm of the mean exponential, so that a softmax gives every
    kept class the probability that it had.
    """
    values, classes = scores.topk(count, dim=1)
    rest = scores.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
    shared = rest - math.log(scores.shape[1] - count)
    return torch.cat((values, shared.clamp_min(-6e4)), 1), classes


def columns_of(batch: pa.RecordBatch, where: str) -> Columns:
    """The columns of a checked batch without its numbers, and without a copy.

    Raises:
        DataError: there are gaps in it.
    """
    found: Columns = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if column.null_count:
            raise DataError(f"the column {field.name} has gaps", where=where)
        if field.name == ID:
            continue
        values = column.flatten()  # unlike .values, it minds the offset of a slice
        if values.null_count or len(values) != len(batch) * field.type.list_size:
            raise DataError(f"the column {field.name} has gaps", where=where)
        found[field.name] = from_dlpack(values).view(len(batch), field.type.list_size)
    return found


def ids_of(batch: pa.RecordBatch, expected: pa.Schema, where: str) -> NDArray[np.int64]:
    """Check a batch that came from outside, in constant time, and return its samples' numbers.

    Raises:
        DataError: another schema, or inconsistent buffers.
    """
    check_schema(batch.schema, expected, where)
    try:
        batch.validate()
    except pa.ArrowInvalid as error:
        raise DataError(f"a damaged record batch: {error}", where=where) from error
    if batch.column(0).null_count:
        raise DataError("a sample has no number", where=where)
    ids: NDArray[np.int64] = batch.column(0).to_numpy(zero_copy_only=True)
    return ids


def decode(
    schema: KnowledgeSchema, names: Iterable[str], columns: Columns, where: str
) -> dict[str, Tensor]:
    """Records as the student uses them.

    Args:
        schema: of the columns.
        names: keys that are wanted.
        columns: of all of these keys.
        where: whose they are, for errors.

    Returns:
        Key → (N, …) in the type it was stored in.

    Raises:
        DataError: a value is not finite, or a class is outside of the scores.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        key = schema.key(name, where)
        values = columns[name]
        if not _finite(values):
            raise DataError(f"{name} holds values that are not finite", where=where)
        if key.top_k is not None:
            classes = columns[f"{name}#classes"].long()
            if bool((classes < 0).any()) or bool((classes >= key.shape[0]).any()):
                raise DataError(f"{name} names classes outside of {key.shape[0]}", where=where)
            whole = values[:, -1:].expand(-1, key.shape[0]).contiguous()
            values = whole.scatter_(1, classes, values[:, :-1])
        found[name] = values.reshape(len(values), *key.shape)
    return found
