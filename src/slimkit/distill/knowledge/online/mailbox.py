"""Mailbox: named JSON values that student and teacher exchange beside knowledge."""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """Named JSON values from the other side, kept until they are read.

    Safe to use from several threads; keeps the latest value of each name.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._values: dict[str, Any] = {}
        self._changed = threading.Condition()

    def put(self, name: str, value: Any) -> None:
        """File a value; the oldest goes when there are too many.

        Args:
            name: of the value.
            value: plain data.
        """
        with self._changed:
            self._values.pop(name, None)
            self._values[name] = value
            while len(self._values) > self._limit:
                del self._values[next(iter(self._values))]
            self._changed.notify_all()

    def get(self, name: str, timeout: float = 0.0) -> Any:
        """The latest value of that name, waiting ``timeout`` seconds for one; else None."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._values, timeout)
            return self._values.get(name)
