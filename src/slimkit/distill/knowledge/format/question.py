"""Wire format of a question about samples: a few checked bytes, no pickle, no code.

``SKA1``, four zero bytes, then little-endian int64: the number of the pass, a bit per wanted key
(in the order of the schema), and the numbers of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimkit.artifact import parse_json
from slimkit.distill.knowledge.format.schema import KnowledgeSchema
from slimkit.errors import ArtifactError, DataError, nearest

__all__ = ["MAX_ASK_ROWS", "MAX_NOTE_BYTES", "Ask", "Question", "pack_ask", "read_ask", "read_note"]

MAX_ASK_ROWS = 65_536
"""Samples of one question at most: 512 KiB of numbers, which a stranger can make a teacher read."""

MAX_NOTE_BYTES = 65_536
"""Bytes of one JSON note at most, for the same reason."""

_MAGIC = b"SKA1\0\0\0\0"


@dataclass(frozen=True)
class Question:
    """What a student wants to know about.

    Attributes:
        ids: int64 (B,), numbers of samples or of queries, all different.
        inputs: name → (B, …), for a teacher that has no samples of its own.
    """

    ids: NDArray[np.int64]
    inputs: Mapping[str, NDArray[np.generic]] | None = None


@dataclass(frozen=True)
class Ask:
    """A question as it is sent.

    Attributes:
        number: of the pass.
        names: of the keys that are wanted.
        ids: numbers of samples.
    """

    number: int
    names: tuple[str, ...]
    ids: NDArray[np.int64]


def pack_ask(schema: KnowledgeSchema, ask: Ask) -> bytes:
    """The bytes of a question."""
    mask = sum(1 << place for place, name in enumerate(schema.names) if name in ask.names)
    head = np.array([ask.number, mask - (1 << 64) if mask >> 63 else mask], "<i8")
    return _MAGIC + head.tobytes() + ask.ids.astype("<i8", copy=False).tobytes()


def read_ask(schema: KnowledgeSchema, data: bytes, limit: int) -> Ask:
    """Read a question that came from outside.

    Args:
        schema: what can be asked for.
        data: the bytes.
        limit: samples per question.

    Raises:
        DataError: it is no question, too long, or asks for what there is not.
    """
    body = len(data) - len(_MAGIC)
    if data[: len(_MAGIC)] != _MAGIC or body % 8 or body < 24:
        raise DataError("this is not a question", where="ask")
    if body // 8 - 2 > limit:
        raise DataError(f"{body // 8 - 2} samples at once, at most {limit}", where="ask")
    numbers = np.frombuffer(data, "<i8", offset=len(_MAGIC)).astype(np.int64)
    number, mask, ids = int(numbers[0]), int(numbers[1]) % (1 << 64), numbers[2:]
    if number < 0 or (schema.passes is not None and number >= schema.passes):
        raise DataError(f"there is no pass {number}", where="ask")
    if mask == 0 or mask >> len(schema.keys):
        raise DataError(f"there are {len(schema.keys)} keys, asked for {mask:#x}", where="ask")
    if len(np.unique(ids)) < len(ids):
        raise DataError("a sample is asked for twice in one question", where="ask")
    names = tuple(name for place, name in enumerate(schema.names) if mask >> place & 1)
    return Ask(number, names, ids)


def read_note(data: bytes, allowed: Sequence[str]) -> dict[str, Any]:
    """A small JSON object from outside, with exactly these keys.

    Raises:
        DataError: too long, not JSON, or other keys.
    """
    if len(data) > MAX_NOTE_BYTES:
        raise DataError(f"{len(data)} bytes, at most {MAX_NOTE_BYTES}", where="note")
    try:
        value = parse_json(data, "note")
    except ArtifactError as error:
        raise DataError("this is not JSON", where="note") from error
    if not isinstance(value, dict) or set(value) != set(allowed):
        strange = [key for key in value if key not in allowed] if isinstance(value, dict) else []
        raise DataError(
            f"expected the keys {', '.join(allowed)}",
            where="note",
            hint=nearest(strange[0], allowed) if strange else None,
        )
    return value
