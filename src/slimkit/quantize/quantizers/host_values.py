"""Numbers in buffers, read on the host: a cache that notices when a buffer changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from slimkit.runtime.export_state import is_exporting

__all__ = ["HostValue"]

T = TypeVar("T")


class HostValue(Generic[T]):
    """What a buffer says as a Python value, read again only after the buffer has changed.

    The state of a quantizer is in its buffers alone, so that ``state_dict``, ``deepcopy`` and
    whoever puts buffers back in place carry all of it. Reading a number from a GPU waits for all
    work before it, though; the version counter of a tensor tells without waiting whether it has
    to be read. On a CPU reading costs nothing and is done every time.

    Args:
        read: the buffer → its value.
        value: before the first reading.
    """

    def __init__(self, read: Callable[[Tensor], T], value: T) -> None:
        self._read, self._value = read, value
        self._buffer: Tensor | None = None
        self._version = -1

    def of(self, buffer: Tensor) -> T:
        """The value of ``buffer``; the last one read while an export traces the network."""
        if is_exporting():  # a traced tensor has no values
            return self._value
        if buffer.is_cpu or buffer.is_inference():
            self._value = self._read(buffer)
        elif buffer is not self._buffer or buffer._version != self._version:
            self.know(buffer, self._read(buffer))
        return self._value

    def know(self, buffer: Tensor, value: T) -> None:
        """``buffer`` holds ``value`` now: there is no need to read it."""
        self._buffer, self._version, self._value = buffer, buffer._version, value
