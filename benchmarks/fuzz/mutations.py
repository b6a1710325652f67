"""Random damage: to bytes, to JSON values, to texts, to mappings of settings."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

__all__ = ["damaged_bytes", "damaged_text", "damaged_value"]

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "a", "../a", "/dev/null", "\x00", "\x1b[31m", "🙂" * 10, "1e9", "nan"),
    *([], {}, [None], [[]], {"type": "a"}, {"": None}, ["a", 1], {"a": {"b": {"c": []}}}),
)
"""Values that belong almost nowhere."""
_PIECES = (
    b"",
    b"\x00" * 16,
    b"{",
    b"]",
    b"\xff\xfe",
    b"null",
    b"-1",
    b"NaN",
    b"9" * 400,
    b"[" * 3000,
)


def damaged_bytes(content: bytes, numbers: random.Random) -> bytes:
    """Flip, cut, double, blank or replace a part; the result differs from ``content``."""
    for _ in range(20):
        changed = _changed_bytes(content, numbers)
        if changed != content:
            return changed
    return content + b"\x00"


def _changed_bytes(content: bytes, numbers: random.Random) -> bytes:
    size = len(content)
    place = numbers.randrange(size) if size else 0
    length = min(size - place, numbers.choice([1, 4, 64, 4096]))
    kind = numbers.randrange(7)
    if kind == 0:  # one bit
        flipped = bytearray(content)
        if size:
            flipped[place] ^= 1 << numbers.randrange(8)
        return bytes(flipped)
    if kind == 1:  # cut off, as by a full disk
        return content[:place]
    if kind == 2:  # blanked, as after a power cut
        return content[:place] + b"\x00" * length + content[place + length :]
    if kind == 3:  # a part twice
        return content[: place + length] + content[place:]
    if kind == 4:  # a part missing
        return content[:place] + content[place + length :]
    if kind == 5:  # something else put in
        return content[:place] + numbers.choice(_PIECES) + content[place:]
    return numbers.choice(_PIECES)  # something else altogether


def damaged_value(value: Any, numbers: random.Random) -> Any:
    """A copy of a JSON-able value with one or two of its nodes replaced, removed or doubled."""
    changed = copy.deepcopy(value)
    for _ in range(1 + (numbers.random() < 0.25)):
        changed = _changed_value(changed, numbers)
    return changed


def _changed_value(value: Any, numbers: random.Random) -> Any:
    holders = list(_holders(value))
    if not holders:
        return numbers.choice(_ODD)
    holder = numbers.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = numbers.choice(keys)
    kind = numbers.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict) and isinstance(key, str):
        holder[key[:-1] or key + "x"] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif kind == 3 and isinstance(holder[key], int | float):
        holder[key] = numbers.choice([-holder[key], holder[key] + 1, holder[key] * 10**9])
    else:
        holder[key] = copy.deepcopy(numbers.choice(_ODD))
    return value


def _holders(value: Any) -> Any:
    """Every mapping and list with something in it."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def damaged_text(text: str, numbers: random.Random) -> bytes:
    """Damage to a JSON text: half of the time to its values, else to its bytes."""
    try:
        value = json.loads(text)
    except ValueError:
        return damaged_bytes(text.encode(), numbers)
    if numbers.random() < 0.5:
        return damaged_bytes(text.encode(), numbers)
    return json.dumps(damaged_value(value, numbers)).encode()
