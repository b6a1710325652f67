"""Arrow Flight client with retries: the student's end of a connection to an online teacher."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from slimkit.artifact import PathLike, parse_json, read_bytes
from slimkit.distill.knowledge.format.encoding import arrays_of, columns_of, decode, ids_of
from slimkit.distill.knowledge.format.question import Ask, Question, pack_ask
from slimkit.distill.knowledge.format.schema import KnowledgeSchema, check_schema
from slimkit.distill.knowledge.online.serving import SERVING
from slimkit.distill.knowledge.online.tokens import token_from_environment
from slimkit.distill.recording.records import Records
from slimkit.errors import ArtifactError, DataError, InputError, SlimkitError, TeacherError

__all__ = ["Connection", "LostTeacherError", "Patience", "Trust"]

_MAX_DESCRIPTION = 2**26
"""Bytes of a teacher's description at most (64 MiB: names of millions of classes)."""
_SPARE = 2**20
"""Bytes that an answer may have beyond its rows, for headers, padding and notes."""
_CUT_OFF = 3
"""Answers that break off one after the other until the teacher is given up: gRPC cancels an answer
that is larger than announced without saying so, and one may break off by chance."""
_ROUND = (0.05, 2.0)
"""Seconds before the first retry, and at most before any further one (exponential back-off)."""
_LOST = (
    flight.FlightUnavailableError,
    flight.FlightTimedOutError,
    flight.FlightInternalError,
    flight.FlightCancelledError,
)


class LostTeacherError(TeacherError):
    """A teacher has not answered for as long as the student's patience lasts."""


@dataclass(frozen=True)
class Patience:
    """How long a student waits.

    Attributes:
        answer: seconds for one question, after which it is asked again.
        lost: seconds without any answer after which the teacher is given up.
    """

    answer: float = 30.0
    lost: float = 120.0


@dataclass(frozen=True)
class Trust:
    """How student and teacher know each other.

    Attributes:
        token: from the teacher's secret; None reads ``$SLIMKIT_TOKEN`` or
            ``$SLIMKIT_TOKEN_FILE`` whenever one is needed, so that it may be renewed.
        roots: PEM file of who signs the teacher's certificate (``$SLIMKIT_TLS_ROOTS``); None
            trusts whom the system does.
        certificate, key: PEM files of the student's own, where the teacher asks for one
            (``$SLIMKIT_TLS_CERT``, ``$SLIMKIT_TLS_KEY``).
    """

    token: str | None = field(default=None, repr=False)
    roots: PathLike | None = None
    certificate: PathLike | None = None
    key: PathLike | None = None

    @classmethod
    def from_environment(cls) -> Trust:
        """What the environment variables say."""
        names = ("SLIMKIT_TLS_ROOTS", "SLIMKIT_TLS_CERT", "SLIMKIT_TLS_KEY")
        return cls(None, *(os.environ.get(name) for name in names))


class Connection:
    """Calls one teacher, and calls again when the connection breaks.

    Args:
        address: ``grpc://host:port`` or ``grpc+tls://host:port``.
        trust: token and certificates.
        patience: how long to wait.
        state: answers what the teacher asks about the student, ``about -> JSON``.

    Attributes:
        schema: what the teacher knows.
        batch_size, parallel: how it likes to be asked.

    Raises:
        TeacherError: no answer in time, a bad token, or not a teacher.
        InputError: a certificate without its key, or the other way round.
    """

    def __init__(
        self, address: str, trust: Trust, patience: Patience, state: Callable[[str], Any] | None
    ) -> None:
        self.address = address
        self._trust, self._patience, self._state = trust, patience, state
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._client: Any = None
        self._limit = _MAX_DESCRIPTION
        self._heard = time.monotonic()
        described: tuple[KnowledgeSchema, int, int] = self._kept(self._describe)
        self.schema, self.batch_size, self.parallel = described
        # from here on the largest message that can be right is known: a batch, or the description
        description = len(self.schema.arrow().serialize())
        batch = 2 * self.schema.row_bytes * self.batch_size
        self._limit = description + batch + _SPARE
        self._drop(self._client)

    def fetch(self, question: Question, number: int, names: Sequence[str]) -> Records:
        """Ask about samples until there is an answer.

        Returns:
            Key → (B, …), in the order of the question.

        Raises:
            TeacherError: the teacher refuses, is gone for too long, or answers something else.
        """
        received: list[pa.RecordBatch] = []
        self._kept(lambda client: self._receive(client, question, number, tuple(names), received))
        whole = received[0] if len(received) == 1 else pa.concat_batches(received)
        return decode(self.schema, names, columns_of(whole, self.address), self.address)

    def tell(self, name: str, value: Any) -> None:
        """Send a named JSON value, which the teacher finds in its ``mail``.

        Raises:
            TeacherError: it is gone, or refuses the value.
        """
        body = _json({"name": name, "value": value}, "value")
        self._kept(lambda client: list(client.do_action(("tell", body), self._options())))

    def close(self) -> None:
        """End all calls that are waiting."""
        self._closed.set()
        self._drop(self._client)

    def _describe(self, client: Any) -> tuple[KnowledgeSchema, int, int]:
        results = list(client.do_action(("describe", b""), self._options()))
        try:
            found = pa.ipc.read_schema(results[0].body)
            liked = parse_json((found.metadata or {})[SERVING], self.address)
            batch_size, parallel = int(liked["batch_size"]), int(liked["parallel"])
        except (pa.ArrowException, LookupError, ValueError, TypeError, ArtifactError) as error:
            raise TeacherError("this is not a Slimkit teacher", where=self.address) from error
        schema = KnowledgeSchema.from_arrow(found, self.address)
        if not (1 <= batch_size <= 2**16 and 1 <= parallel <= 1024):
            raise TeacherError(f"it asks for batches of {batch_size}", where=self.address)
        return schema, batch_size, parallel

    def _receive(
        self,
        client: Any,
        question: Question,
        number: int,
        names: tuple[str, ...],
        received: list[pa.RecordBatch],
    ) -> None:
        """Ask about what has not been received yet, and add it."""
        expected = self.schema.arrow(names)
        rows = sum(map(len, received))
        data = pack_ask(self.schema, Ask(number, names, question.ids[rows:]))
        if question.inputs is None:
            writer, reader = None, client.do_get(flight.Ticket(data), self._options())
        else:  # a writer that is forgotten takes the answer with it
            writer, reader = self._send(client, data, question)
        self._check_same(reader.schema, expected)
        with contextlib.suppress(StopIteration):
            while rows <= len(question.ids):
                chunk = reader.read_chunk()
                if chunk.app_metadata is not None:
                    self._reply(client, chunk.app_metadata.to_pybytes())
                if chunk.data is None:
                    continue
                found = ids_of(chunk.data, expected, self.address)
                if not np.array_equal(found, question.ids[rows : rows + len(found)]):
                    raise TeacherError("it answered about other samples", where=self.address)
                if len(found) == 0:  # or it could keep us here without ever telling anything
                    raise TeacherError("it answered about no samples", where=self.address)
                rows += len(found)
                received.append(chunk.data)
                self._heard = time.monotonic()
        if writer is not None:
            writer.close()
        if rows != len(question.ids):
            raise TeacherError(
                f"it answered about {rows} of {len(question.ids)} samples", where=self.address
            )

    def _send(self, client: Any, data: bytes, question: Question) -> tuple[Any, Any]:
        """Ask with inputs: all of them are written before the answer is read."""
        import torch

        expected = self.schema.input_arrow()
        arrays: list[pa.Array] = []
        for key in self.schema.inputs:
            given = (question.inputs or {}).get(key.name)
            if given is None or given.shape != (len(question.ids), *key.shape):
                shape = "missing" if given is None else str(given.shape)
                raise DataError(
                    f"the input {key.name} is {shape}, it takes (B, {key.shape})",
                    where=self.address,
                )
            arrays += arrays_of(key, torch.as_tensor(given), self.address)
        descriptor = flight.FlightDescriptor.for_command(data)
        writer, reader = client.do_exchange(descriptor, self._options())
        try:
            writer.begin(expected)
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=expected))
            writer.done_writing()
        except (pa.ArrowException, OSError):
            reader.read_chunk()  # raises what the teacher said
            raise
        return writer, reader

    def _reply(self, client: Any, note: bytes) -> None:
        """Answer what the teacher asked along with its knowledge."""
        try:
            asked = parse_json(note, self.address)
            number, about = int(asked["question"]), str(asked["about"])
        except (ValueError, LookupError, TypeError, ArtifactError):
            return
        value = self._state(about) if self._state is not None else None
        body = _json({"question": number, "value": value}, "state")
        with contextlib.suppress(flight.FlightServerError):  # someone else answered first
            list(client.do_action(("reply", body), self._options()))

    def _kept(self, call: Callable[[Any], Any]) -> Any:
        """Retry ``call(client)`` until it succeeds or patience ends."""
        begun, cut_off = time.monotonic(), 0
        for pause in _pauses():
            client = self._connected()
            try:
                result = call(client)
            except (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError) as error:
                raise TeacherError(
                    f"it does not let us in: {_told(error)}",
                    where=self.address,
                    hint="set SLIMKIT_TOKEN, or SLIMKIT_TOKEN_FILE",
                ) from error
            except flight.FlightServerError as error:
                raise TeacherError(_told(error), where=self.address) from error
            except SlimkitError:
                raise
            except (*_LOST, pa.ArrowException, OSError) as error:
                cut_off = cut_off + 1 if isinstance(error, flight.FlightCancelledError) else 0
                if cut_off == _CUT_OFF and not self._closed.is_set():
                    raise TeacherError(
                        "its answer breaks off again and again: is it larger than the "
                        f"{self._limit} bytes that were announced?",
                        where=self.address,
                    ) from error
                silent = time.monotonic() - max(self._heard, begun)
                self._drop(client)
                if silent + pause > self._patience.lost or self._closed.wait(pause):
                    raise self._gone(error, silent) from error
            else:
                self._heard = time.monotonic()
                return result
        raise AssertionError  # pauses never end

    def _gone(self, error: Exception, silent: float) -> TeacherError:
        if self._closed.is_set():
            return TeacherError("the connection was closed", where=self.address)
        return LostTeacherError(
            f"no answer for {silent:.0f} s: {_told(error)}",
            where=self.address,
            hint="is it running, and is the address right?",
        )

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _check_same(self, found: pa.Schema, expected: pa.Schema) -> None:
        """An answer says who gives it: gRPC connects again on its own, to whoever is there."""
        if found.equals(expected, check_metadata=True):
            return
        check_schema(found, expected, self.address)
        schema = KnowledgeSchema.from_arrow(found, self.address)
        if schema != self.schema:
            raise TeacherError(
                f"another teacher answers now: {schema.teacher!r} instead of "
                f"{self.schema.teacher!r}",
                where=self.address,
            )

    def _connect(self) -> Any:
        trust = self._trust
        options: dict[str, Any] = {}
        if trust.roots is not None:
            options["tls_root_certs"] = read_bytes(trust.roots)
        if (trust.certificate is None) != (trust.key is None):
            missing = "certificate" if trust.certificate is None else "key"
            raise InputError(f"the {missing} that belongs to it is missing", where=missing)
        if trust.certificate is not None and trust.key is not None:
            options["cert_chain"] = read_bytes(trust.certificate)
            options["private_key"] = read_bytes(trust.key)
        try:
            return flight.FlightClient(
                self.address,
                generic_options=[
                    ("grpc.max_receive_message_length", min(self._limit, 2**31 - 1)),
                    ("grpc.use_local_subchannel_pool", 1),
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.max_reconnect_backoff_ms", 1000),
                    ("grpc.enable_http_proxy", 0),
                ],
                **options,
            )
        except (pa.ArrowException, OSError) as error:
            raise TeacherError(f"not an address: {_told(error)}", where=self.address) from error

    def _drop(self, client: Any) -> None:
        """Forget a connection that failed; the next call makes a new one."""
        with self._lock:
            if client is not None and self._client is client:
                self._client = None

    def _options(self) -> Any:
        token = self._trust.token or token_from_environment()
        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        return flight.FlightCallOptions(timeout=self._patience.answer, headers=headers)


def _json(value: object, where: str) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be told as JSON: {error}", where=where) from error


def _pauses() -> Iterator[float]:
    pause, longest = _ROUND
    while True:
        yield pause
        pause = min(2 * pause, longest)


def _told(error: Exception) -> str:
    """What the peer or gRPC said, without the wrapping."""
    text = str(error).partition("\n")[0]
    for mark in (". Detail:", ". gRPC client debug", " gRPC client debug"):
        text = text.partition(mark)[0]
    return text.removeprefix("refused: ")[:300]
