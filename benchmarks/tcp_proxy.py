"""A small TCP proxy that stalls and breaks connections on demand: to try out bad networks."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Self

__all__ = ["Proxy"]

_POLL = 0.05


class Proxy:
    """Forwards connections to a server; :meth:`stall` and :meth:`reset` disturb them.

    Args:
        host, port: of the server; it may come and go.

    Attributes:
        port: where the proxy listens on 127.0.0.1.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(_POLL)
        self.port = int(self._listening.getsockname()[1])
        self._silent_until = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, name="slimkit-proxy", daemon=True).start()

    def stall(self, seconds: float) -> None:
        """Let nothing through for so long; connections stay open."""
        self._silent_until = time.monotonic() + seconds

    def reset(self) -> None:
        """Break all connections, as if a machine between had crashed."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _break(end)

    def close(self) -> None:
        """Break all connections and stop listening."""
        self._stop.set()
        self.reset()
        self._listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                student, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            try:
                teacher = socket.create_connection(self._target, timeout=5)
            except OSError:
                _break(student)
                continue
            with self._lock:
                self._pairs.append((student, teacher))
            for source, sink in ((student, teacher), (teacher, student)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            source.settimeout(None)
            while data := source.recv(1 << 16):
                while (rest := self._silent_until - time.monotonic()) > 0:
                    if self._stop.wait(min(rest, _POLL)):
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _break(end: socket.socket) -> None:
    """Close with a reset instead of a farewell, and wake whoever reads from it."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
