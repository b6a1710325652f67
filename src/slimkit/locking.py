"""Locks: between processes for files and folders, between threads for what a process has once."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from slimkit.errors import ArtifactError

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from slimkit.artifact import PathLike

__all__ = ["SharedSetting", "file_lock", "one_at_a_time"]

T = TypeVar("T")

_POLL = 0.1
"""Seconds between two attempts to take a lock that another process holds."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What a file system without locks answers, for instance NFS without its lock daemon."""


def _nobody() -> None:
    """Tell nobody."""


@contextlib.contextmanager
def file_lock(
    path: PathLike,
    *,
    patience: float | None = None,
    waiting: Callable[[], None] = _nobody,
    busy: str = "another process writes it",
    where: PathLike | None = None,
    hint: str | None = None,
) -> Iterator[None]:
    """Exclusive lock between processes (flock; LockFileEx on Windows), freed when a process dies.

    Args:
        path: of the lock's own file, which holds nothing; made if need be. Never the file that is
            written: on Windows a locked file cannot be opened a second time.
        patience: seconds to wait for another process; None waits as long as it takes, 0 not at all.
        waiting: is called once, before waiting for another process.
        busy: what the error says when the patience is at an end.
        where: what the error is about; ``path`` by default.
        hint: what the error advises.

    Raises:
        ArtifactError: another process held it all the time, or the file cannot be made. On a file
            system that has no locks there is no error, and no lock.
    """
    from filelock import FileLock

    lock = FileLock(str(path), thread_local=False)
    place = str(path if where is None else where)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not _taken(lock, 0):
            waiting()
            if not _taken(lock, -1 if patience is None else patience):
                raise ArtifactError(busy, where=place, hint=hint)
    except ArtifactError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            why = f"cannot write: {error.strerror or error}"
            raise ArtifactError(why, where=place, hint=hint) from error
    try:
        yield
    finally:
        lock.release()


def _taken(lock: BaseFileLock, seconds: float) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=seconds, poll_interval=_POLL)
    except Timeout:
        return False
    return True


class SharedSetting(Generic[T]):
    """Reference counting of a setting that the whole process has once.

    It has ``value`` while at least one thread is inside :meth:`held`; the last one that leaves
    puts back what the first one found.

    Args:
        read: the setting now.
        write: change it.
        value: what it is inside.
    """

    def __init__(self, read: Callable[[], T], write: Callable[[T], object], value: T) -> None:
        self._read, self._write, self._value = read, write, value
        self._before = value
        self._inside = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The setting has its value inside."""
        with self._lock:
            if not self._inside:
                self._before = self._read()
                self._write(self._value)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._write(self._before)


class _Tracing:
    """The lock of :func:`one_at_a_time`; a forked process begins with a free one."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def renew(self) -> None:
        self.lock = threading.RLock()


_tracing = _Tracing()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tracing.renew)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """A lock (reentrant) on captures, exports and copies of networks, for a block or a function.

    A capture changes modes and attributes of the network for a while, and torch's exporter
    replaces methods of :class:`torch.nn.Module`: other threads wait.
    """
    with _tracing.lock:
        yield
