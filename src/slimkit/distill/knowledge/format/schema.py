"""What knowledge looks like: keys with shapes and types, and the samples that they belong to.

A record batch of knowledge has the column ``id`` (int64) and one or two columns per key. All
else that both sides must agree on travels as JSON in the metadata of the Arrow schema.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator as validator

from slimkit.errors import DataError, nearest

__all__ = ["ID", "LOGITS", "MAX_ROW_BYTES", "KeySpec", "KnowledgeSchema", "check_schema"]

ID = "id"
"""The column with the numbers of the samples."""

LOGITS = "logits"
"""The key of a network's output; any other key is the path of a layer."""

MAX_ROW_BYTES = 2**28
"""A sample with more knowledge than this is refused before anything is allocated for it."""

_METADATA = b"slimkit.knowledge"
_TYPES = {"float16": pa.float16(), "float32": pa.float32(), "int64": pa.int64()}
_BYTES = {"float16": 2, "float32": 4, "int64": 8}
_Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\s#]+$")]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeySpec(_Value):
    """One key of the knowledge.

    Attributes:
        name: ``"logits"`` or the path of a layer.
        shape: of one sample, without the batch, such as ``(classes,)`` or ``(C, H, W)``.
        dtype: ``"float16"``, ``"float32"`` or (of inputs) ``"int64"``, as stored and sent.
        top_k: keep the so many largest scores of each sample, and one score that all others
            share; only where ``shape`` is ``(classes,)``. ``None`` keeps everything.
    """

    name: _Name
    shape: Annotated[tuple[_Size, ...], Field(max_length=4)]
    dtype: Literal["float16", "float32", "int64"] = "float16"
    top_k: Annotated[int, Field(ge=1)] | None = None

    @validator(mode="after")
    def _fits(self) -> Self:
        if self.name == ID:
            raise ValueError("the name id is taken by the samples' numbers")
        if self.top_k is not None and (len(self.shape) != 1 or self.top_k >= self.shape[0]):
            raise ValueError(f"top_k={self.top_k} needs a vector of more values, not {self.shape}")
        if self.row_bytes > MAX_ROW_BYTES:
            raise ValueError(f"{self.row_bytes} bytes per sample, at most {MAX_ROW_BYTES} are kept")
        return self

    @property
    def width(self) -> int:
        """Values that are stored per sample (with top-k, one is shared by the rest)."""
        return math.prod(self.shape) if self.top_k is None else self.top_k + 1

    @property
    def row_bytes(self) -> int:
        """Bytes per sample."""
        chosen = 0 if self.top_k is None else 4 * self.top_k
        return self.width * _BYTES[self.dtype] + chosen

    def fields(self) -> list[pa.Field]:
        """The columns that hold this key."""
        values = pa.list_(_TYPES[self.dtype], self.width)
        found = [pa.field(self.name, values, nullable=False)]
        if self.top_k is not None:
            where = pa.list_(pa.int32(), self.top_k)
            found.append(pa.field(f"{self.name}#classes", where, nullable=False))
        return found


class KnowledgeSchema(_Value):
    """What a teacher says, about which samples, and how their images were changed.

    Attributes:
        version: of this format.
        keys: what is known of each sample.
        fingerprint: SHA-256 (hex) of what decides which image a sample's number means and how
            it is changed; empty for a teacher that is sent its inputs.
        samples: how many samples there are; 0 for a teacher that is sent its inputs.
        classes: names in the order of the logits; empty where they are not known.
        seed: of the random changes of the images.
        passes: differently changed passes over the samples; ``None`` is as many as asked for.
        teacher: a name and a hash of the weights, for people and for resuming.
        inputs: what must be sent along with a question; empty for a teacher with samples.
    """

    version: Literal[1] = 1
    keys: Annotated[tuple[KeySpec, ...], Field(min_length=1, max_length=64)]
    fingerprint: Annotated[str, StringConstraints(max_length=128)] = ""
    samples: Annotated[int, Field(ge=0)] = 0
    classes: Annotated[tuple[str, ...], Field(max_length=1_000_000)] = ()
    seed: int = 0
    passes: Annotated[int, Field(ge=1)] | None = None
    teacher: Annotated[str, StringConstraints(max_length=400)] = ""
    inputs: Annotated[tuple[KeySpec, ...], Field(max_length=64)] = ()

    @validator(mode="after")
    def _names_differ(self) -> Self:
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names):
            raise ValueError(f"a key is there twice: {', '.join(names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the keys."""
        return tuple(key.name for key in self.keys)

    @property
    def row_bytes(self) -> int:
        """Bytes per sample with all keys, without padding."""
        return 8 + sum(key.row_bytes for key in self.keys)

    def key(self, name: str, where: str) -> KeySpec:
        """The key called ``name``.

        Raises:
            DataError: there is none; with the nearest.
        """
        for key in self.keys:
            if key.name == name:
                return key
        raise DataError(
            f"there is no knowledge called {name!r}", where=where, hint=nearest(name, self.names)
        )

    def arrow(self, names: Iterable[str] | None = None) -> pa.Schema:
        """Columns of all keys, or of some, with this description in the metadata."""
        return _arrow(self, frozenset(self.names if names is None else names))

    def input_arrow(self) -> pa.Schema:
        """Columns of the inputs that a question brings along."""
        return pa.schema([field for key in self.inputs for field in key.fields()])

    @classmethod
    def from_arrow(cls, schema: pa.Schema, where: str) -> KnowledgeSchema:
        """The description in a schema's metadata.

        Raises:
            DataError: there is none, or it is damaged, or the columns are others.
        """
        text = (schema.metadata or {}).get(_METADATA)
        if text is None:
            raise DataError("this is no knowledge: its description is missing", where=where)
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            raise DataError(
                f"the description of the knowledge is damaged: {path}: {first['msg']}", where=where
            ) from error
        names = [key.name for key in found.keys if key.name in schema.names]
        check_schema(schema, found.arrow(names), where)
        return found

    def to_json(self) -> dict[str, object]:
        """JSON-able values."""
        value: dict[str, object] = json.loads(self.model_dump_json())
        return value


@functools.lru_cache(64)
def _arrow(schema: KnowledgeSchema, names: frozenset[str]) -> pa.Schema:
    fields = [pa.field(ID, pa.int64(), nullable=False)]
    fields += [field for key in schema.keys if key.name in names for field in key.fields()]
    return pa.schema(fields, {_METADATA: schema.model_dump_json().encode()})


def check_schema(found: pa.Schema, expected: pa.Schema, where: str) -> None:
    """Make sure that columns have the names and types that were announced.

    Raises:
        DataError: they have not.
    """
    if found.equals(expected, check_metadata=False):
        return
    ours: Sequence[str] = [f"{field.name}: {field.type}" for field in expected]
    theirs: Sequence[str] = [f"{field.name}: {field.type}" for field in found]
    missing = [text for text in ours if text not in theirs] or list(ours)
    raise DataError(
        f"another schema than announced: expected {', '.join(missing[:4])}",
        where=where,
        hint=f"it has {', '.join(theirs[:6])}",
    )
