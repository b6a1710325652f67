"""An online teacher: knowledge by the numbers of samples, over Arrow Flight.

Every question is a call of its own and carries all that it needs, so a student may ask again
after a broken connection, and a restarted teacher goes on as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import flight

from slimkit.artifact import PathLike, read_bytes
from slimkit.distill.knowledge.format.encoding import columns_of
from slimkit.distill.knowledge.format.question import MAX_ASK_ROWS, Ask, read_ask, read_note
from slimkit.distill.knowledge.format.schema import check_schema
from slimkit.distill.knowledge.online.mailbox import Mailbox
from slimkit.distill.knowledge.online.tokens import check_secret, check_token
from slimkit.distill.knowledge.teaching import Teacher
from slimkit.errors import DataError, InputError, SlimkitError, TeacherError

__all__ = ["SERVING", "TLSFiles", "TeacherServer", "serve"]

SERVING = b"slimkit.serving"
"""Metadata of the schema that says how this teacher likes to be asked."""

_WAITING = 64
"""Questions that are answered at once; one more is told to come again."""


@dataclass(frozen=True)
class TLSFiles:
    """PEM files of a server.

    Attributes:
        certificate, key: its own.
        client_ca: who signs the certificates that clients must show; None asks for none.
    """

    certificate: PathLike
    key: PathLike
    client_ca: PathLike | None = None


class TeacherServer:
    """Serves a teacher until :meth:`close`; questions are answered as soon as it exists.

    Args:
        teacher: who knows.
        host: address to listen on.
        port: 0 takes a free one.
        secret: at least 16 bytes; students then need a token made from it.
        tls: certificate and key.
        insecure: allow an address that other machines reach without TLS and a secret.
        max_rows: samples per question.

    Attributes:
        address: ``grpc://host:port`` or ``grpc+tls://host:port``.
        mail: what students told, see :meth:`slimkit.distill.knowledge.OnlineTeacher.tell`.

    Raises:
        InputError: other machines could reach it without TLS and a secret, or the secret can be
            guessed.
        TeacherError: the address is taken or not of this machine.
        ArtifactError: a certificate cannot be read.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes | None = None,
        tls: TLSFiles | None = None,
        insecure: bool = False,
        max_rows: int = MAX_ASK_ROWS,
    ) -> None:
        if not (insecure or (tls and secret) or _is_loopback(host)):
            raise InputError(
                f"{host} can be reached from other machines",
                where="host",
                hint="give it TLS files and a secret, or insecure=True (--insecure)",
            )
        if secret is not None:
            check_secret(secret)
        self.teacher = teacher
        self.mail = Mailbox()
        self._questions = _StudentQuestions()
        scheme = "grpc+tls" if tls else "grpc"
        options: dict[str, Any] = {"middleware": {"token": _TokenCheck(secret)}}
        if tls is not None:
            options["tls_certificates"] = [(read_bytes(tls.certificate), read_bytes(tls.key))]
            if tls.client_ca is not None:
                options |= {"verify_client": True, "root_certificates": read_bytes(tls.client_ca)}
        place = f"{scheme}://{_bracketed(host)}:{port}"
        try:
            self._flight = _Flight(self, place, min(max_rows, MAX_ASK_ROWS), options)
        except (pa.ArrowException, OSError) as error:
            raise TeacherError(f"cannot listen: {_first_line(error)}", where=place) from error
        self.port = int(self._flight.port)
        self.address = f"{scheme}://{_bracketed(host)}:{self.port}"

    def ask(self, about: str, timeout: float = 30.0) -> Any:
        """Ask the student that comes next about its state.

        Args:
            about: a name that the student's ``state`` callback understands.
            timeout: seconds to wait.

        Returns:
            What the callback returned, plain JSON.

        Raises:
            TeacherError: no student answered in time.
        """
        return self._questions.ask(about, timeout, self.address)

    def wait(self) -> None:
        """Serve until a signal (Ctrl-C, SIGTERM) or :meth:`close`."""
        self._flight.serve()

    def close(self) -> None:
        """Stop: questions that are being answered still are, new ones are not."""
        self._flight.shutdown()

    def __enter__(self) -> TeacherServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(teacher: Teacher, **options: Any) -> TeacherServer:
    """Start an online teacher; see :class:`TeacherServer` for the options."""
    return TeacherServer(teacher, **options)


class _StudentQuestions:
    """Questions of the teacher to its students, handed out with the next answer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: dict[int, str] = {}
        self._answers: dict[int, Any] = {}
        self._next = 0

    def ask(self, about: str, timeout: float, address: str) -> Any:
        with self._changed:
            number, self._next = self._next, self._next + 1
            self._open[number] = about
            self._changed.wait_for(lambda: number in self._answers, timeout)
            self._open.pop(number, None)
            if number not in self._answers:
                raise TeacherError(
                    f"no student answered within {timeout:g} s about {about!r}", where=address
                )
            return self._answers.pop(number)

    def pending(self) -> bytes | None:
        with self._changed:
            for number, about in self._open.items():
                return json.dumps({"question": number, "about": about}).encode()
        return None

    def answer(self, number: object, value: Any) -> None:
        with self._changed:
            if not isinstance(number, int) or number not in self._open:
                raise DataError(f"there is no question {number!r}", where="reply")
            self._answers[number] = value
            self._changed.notify_all()


class _TokenCheck(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses a call without a good token before its handler runs."""

    def __init__(self, secret: bytes | None) -> None:
        super().__init__()
        self._secret = secret

    def start_call(self, info: Any, headers: Mapping[str, list[str]]) -> None:
        if self._secret is None:
            return
        found = headers.get("authorization", [""])[0]
        try:
            check_token(found.removeprefix("Bearer "), self._secret)
        except TeacherError as error:
            raise flight.FlightUnauthenticatedError(str(error)) from error


class _Flight(flight.FlightServerBase):  # type: ignore[misc]
    """Flight's calls, checked and handed to the teacher."""

    def __init__(
        self, owner: TeacherServer, location: str, limit: int, options: Mapping[str, Any]
    ) -> None:
        self._owner = owner
        self._limit = limit
        self._slots = threading.Semaphore(_WAITING)
        super().__init__(location, **options)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """A question about samples that the teacher has."""
        with self._refusing():
            ask = self._read(ticket.ticket)
        return flight.GeneratorStream(
            self._owner.teacher.schema.arrow(ask.names), self._answers(ask)
        )

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """A question that brings its inputs along: all of them first, then the answer."""
        with self._refusing():
            ask = self._read(descriptor.command or b"")
            inputs = self._received(reader, len(ask.ids))
            batch = self._answer(ask, inputs)
        writer.begin(batch.schema)
        note = self._owner._questions.pending()
        if note is None:
            writer.write_batch(batch)
        else:
            writer.write_with_metadata(batch, note)

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        """The small messages that a student may send."""
        return [
            ("describe", "what the teacher knows, as an Arrow schema"),
            ("tell", "a named value for the teacher"),
            ("reply", "to a question of the teacher"),
        ]

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        """A small message."""
        with self._refusing():
            if action.type == "describe":
                return iter([self._description()])
            if action.type == "tell":
                note = read_note(action.body.to_pybytes(), ("name", "value"))
                if not isinstance(note["name"], str) or len(note["name"]) > 200:
                    raise DataError("the name is not a short text", where="tell")
                self._owner.mail.put(note["name"], note["value"])
            elif action.type == "reply":
                note = read_note(action.body.to_pybytes(), ("question", "value"))
                self._owner._questions.answer(note["question"], note["value"])
            else:
                raise DataError("there is no such action", where="action", hint="tell or reply")
        return iter([b"ok"])

    def list_flights(self, context: Any, criteria: bytes) -> Any:
        """Not offered: what there is, is in ``describe``."""
        raise flight.FlightServerError("refused: there are no flights to list")

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        """Not offered."""
        raise flight.FlightServerError("refused: there are no flights to describe")

    def get_schema(self, context: Any, descriptor: Any) -> Any:
        """Not offered."""
        raise flight.FlightServerError("refused: ask for describe")

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Not offered: inputs come with their question."""
        raise flight.FlightServerError("refused: nothing is stored here")

    def _description(self) -> Any:
        """What the teacher knows, and how it likes to be asked."""
        teacher = self._owner.teacher
        liked = {"batch_size": min(teacher.batch_size, self._limit), "parallel": teacher.parallel}
        found = teacher.schema.arrow()
        metadata = {**found.metadata, SERVING: json.dumps(liked).encode()}
        return found.with_metadata(metadata).serialize()

    def _read(self, data: bytes) -> Ask:
        return read_ask(self._owner.teacher.schema, data, self._limit)

    def _received(self, reader: Any, rows: int) -> dict[str, Any]:
        """Inputs of ``rows`` samples; the schema is checked before any of them is read."""
        expected = self._owner.teacher.schema.input_arrow()
        if not len(expected):
            raise DataError("the teacher has its own inputs, none are sent", where="inputs")
        check_schema(reader.schema, expected, "inputs")
        batches: list[pa.RecordBatch] = []
        with contextlib.suppress(StopIteration):
            while True:
                batch = reader.read_chunk().data
                if batch is None or not len(batch):
                    raise DataError("a message without samples", where="inputs")
                batch.validate()
                batches.append(batch)
                if sum(map(len, batches)) > rows:
                    break
        count = sum(map(len, batches))
        if count != rows:
            raise DataError(f"{count} or more inputs for {rows} samples", where="inputs")
        whole = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
        shapes = {key.name: key.shape for key in self._owner.teacher.schema.inputs}
        columns = columns_of(whole, "inputs")
        return {n: values.reshape(rows, *shapes[n]).numpy() for n, values in columns.items()}

    def _answers(self, ask: Ask) -> Iterator[tuple[pa.RecordBatch, bytes | None]]:
        """The answer in the teacher's own batches, each sent as soon as it is there."""
        size = self._owner.teacher.batch_size
        for start in range(0, len(ask.ids), size):
            with self._refusing():
                part = Ask(ask.number, ask.names, ask.ids[start : start + size])
                batch = self._answer(part, None)
                check_schema(batch.schema, self._owner.teacher.schema.arrow(ask.names), "teacher")
            yield batch, self._owner._questions.pending()

    def _answer(self, ask: Ask, inputs: Mapping[str, Any] | None) -> pa.RecordBatch:
        if not self._slots.acquire(blocking=False):
            raise flight.FlightUnavailableError("busy: too many questions at once")
        try:
            return self._owner.teacher.answer(ask.ids, ask.number, ask.names, inputs)
        finally:
            self._slots.release()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Whatever goes wrong is told to the student in one line; the server stays."""
        try:
            yield
        except flight.FlightError:
            raise
        except SlimkitError as error:
            raise flight.FlightServerError(f"refused: {error}") from error
        except Exception as error:  # a peer must not be able to end the server
            kind = type(error).__name__
            raise flight.FlightServerError(f"refused: {kind}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
