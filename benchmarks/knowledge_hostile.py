"""Messages that no teacher may accept, made from random numbers; part of ``knowledge_faults``."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from slimkit.distill.knowledge.format.question import MAX_NOTE_BYTES, Ask, pack_ask
from slimkit.distill.knowledge.format.schema import KnowledgeSchema
from slimkit.distill.knowledge.online.tokens import issue_token

__all__ = ["HOSTILE", "Target", "good_question"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """A teacher to be rude to.

    Attributes:
        port: on 127.0.0.1.
        secret: of its tokens.
        schema: what it knows.
        client: connected to it.
    """

    port: int
    secret: bytes
    schema: KnowledgeSchema
    client: Any

    @classmethod
    def at(cls, port: int, secret: bytes, schema: KnowledgeSchema) -> Target:
        """Connect."""
        return cls(port, secret, schema, flight.FlightClient(f"grpc://127.0.0.1:{port}"))

    def options(self, token: str | None = "") -> Any:
        """Options of a call, with a good token, another, or none."""
        token = issue_token(self.secret, 60) if token == "" else token
        headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        return flight.FlightCallOptions(timeout=10, headers=headers)

    def ask(self, rng: random.Random) -> Ask:
        """A good question."""
        count = rng.randint(1, 8)
        ids = np.array(rng.sample(range(self.schema.samples), count), np.int64)
        return Ask(rng.randint(0, 3), self.schema.names, ids)


def _answered(read: Callable[[], Any]) -> bool:
    """Whether the teacher gave an answer instead of an error."""
    try:
        found = read()
    except (pa.ArrowException, flight.FlightError, OSError, StopIteration):
        return False
    return bool(found)


def _get(target: Target, ticket: bytes, options: Any = None) -> bool:
    def read() -> Any:
        return target.client.do_get(flight.Ticket(ticket), options or target.options()).read_all()

    return _answered(read)


def _action(target: Target, kind: str, body: bytes, options: Any = None) -> bool:
    chosen = options or target.options()
    return _answered(lambda: list(target.client.do_action((kind, body), chosen)))


def good_question(target: Target, rng: random.Random) -> bool:
    """What is accepted, so that the rest is refused for the right reason."""
    return _get(target, pack_ask(target.schema, target.ask(rng)))


def noise_on_the_wire(target: Target, rng: random.Random) -> bool:
    """Bytes that are not gRPC, or begin like it."""
    data = rng.randbytes(rng.choice([1, 9, 100, 5000]))
    if rng.random() < 0.5:
        data = _PREFACE + data
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", target.port)) as end:
        end.settimeout(0.02)
        end.sendall(data)
        end.recv(1)
    return False  # it has no way to answer; that it lives is seen afterwards


def noise_for_a_question(target: Target, rng: random.Random) -> bool:
    """Random bytes as a question."""
    return _get(target, rng.randbytes(rng.randint(0, 400)))


def a_question_with_a_flipped_byte(target: Target, rng: random.Random) -> bool:
    """A good question with its head damaged."""
    data = bytearray(pack_ask(target.schema, target.ask(rng)))
    # the magic, and the upper bytes of the pass, of the keys, and of the first sample
    place = rng.choice([*range(8), *range(10, 16), *range(18, 24), *range(28, 32)])
    data[place] ^= rng.randint(1, 255)
    return _get(target, bytes(data))


def a_question_that_is_cut_off(target: Target, rng: random.Random) -> bool:
    """A good question without its last bytes."""
    data = pack_ask(target.schema, target.ask(rng))
    return _get(target, data[: -rng.randint(1, 7)])


def a_question_about_strangers(target: Target, rng: random.Random) -> bool:
    """Samples that the teacher does not have."""
    ask = target.ask(rng)
    stranger = rng.choice([-1, target.schema.samples, 2**62, -(2**63)])
    return _get(target, pack_ask(target.schema, Ask(0, ask.names, np.append(ask.ids, stranger))))


def a_question_twice_about_one_sample(target: Target, rng: random.Random) -> bool:
    """A number that is there twice."""
    ask = target.ask(rng)
    return _get(target, pack_ask(target.schema, Ask(0, ask.names, np.append(ask.ids, ask.ids[0]))))


def too_large_a_question(target: Target, rng: random.Random) -> bool:
    """More samples than a question may have."""
    ids = np.arange(rng.choice([70_000, 200_000]), dtype=np.int64)
    return _get(target, pack_ask(target.schema, Ask(0, target.schema.names, ids)))


def a_bad_token(target: Target, rng: random.Random) -> bool:
    """A good question, or action, without a good token."""
    good = issue_token(target.secret, 60)
    place = rng.randrange(len(good))
    swapped = chr(ord(good[place]) ^ 1)
    token = rng.choice(
        [
            None,
            "x" * rng.randint(1, 3000),
            issue_token(target.secret, -rng.randint(1, 10**6)),
            issue_token(rng.randbytes(20), 60),
            good[:-1],
            f"{good[:place]}{swapped}{good[place + 1 :]}",
            f"slimkit.{10**12}.{good.rpartition('.')[2]}",
        ]
    )
    options = target.options(token)
    if rng.random() < 0.5:
        return _action(target, rng.choice(["describe", "tell"]), b'{"name":"a","value":1}', options)
    return _get(target, pack_ask(target.schema, target.ask(rng)), options)


def a_bad_note(target: Target, rng: random.Random) -> bool:
    """Small messages with wrong names, keys, types, depths and sizes."""
    kind, body = rng.choice(
        [
            ("tell", b""),
            ("tell", b"{"),
            ("tell", b"[" * rng.choice([10, 50_000])),
            ("tell", rng.randbytes(rng.randint(1, 300))),
            ("tell", b'{"name": 5, "value": 1}'),
            ("tell", json.dumps({"name": "n" * 300, "value": 1}).encode()),
            ("tell", json.dumps({"name": "n", "value": 1, "more": 2}).encode()),
            ("tell", json.dumps({"name": "n", "value": "v" * MAX_NOTE_BYTES}).encode()),
            ("tell", b"x" * rng.choice([10**5, 3 * 10**6])),
            ("reply", json.dumps({"question": rng.randint(0, 99), "value": 1}).encode()),
            ("reply", json.dumps({"question": [1], "value": 1}).encode()),
            ("", b""),
            (rng.choice(["pickle", "exec", "shutdown", "x" * 1000]), rng.randbytes(50)),
        ]
    )
    return _action(target, kind, body)


def an_exchange_out_of_order(target: Target, rng: random.Random) -> bool:
    """Inputs for a teacher that takes none, before or without a question, of any schema."""
    command = rng.choice([b"", rng.randbytes(50), pack_ask(target.schema, target.ask(rng))])
    columns = rng.randint(1, 3)
    batch = pa.RecordBatch.from_pydict({f"c{i}": pa.array(np.arange(4)) for i in range(columns)})

    def read() -> Any:
        descriptor = flight.FlightDescriptor.for_command(command)
        writer, reader = target.client.do_exchange(descriptor, target.options())
        try:
            step = rng.randint(0, 3)
            if step == 0:
                writer.write_metadata(rng.randbytes(20))
            if step >= 1:
                writer.begin(batch.schema)
            if step >= 2:
                writer.write_batch(batch)
            if step == 3:
                writer.write_with_metadata(batch, rng.randbytes(20))
            writer.done_writing()
            return reader.read_chunk().data
        finally:
            with contextlib.suppress(pa.ArrowException, flight.FlightError, OSError):
                writer.close()

    return _answered(read)


def a_call_that_is_not_offered(target: Target, rng: random.Random) -> bool:
    """The rest of Flight's calls."""
    client, options = target.client, target.options()
    descriptor = flight.FlightDescriptor.for_path(rng.randbytes(8).hex())

    def put() -> bool:
        schema = pa.schema([("x", pa.int64())])
        writer, _ = client.do_put(descriptor, schema, options)
        writer.write_batch(pa.RecordBatch.from_pydict({"x": [1]}, schema=schema))
        writer.close()
        return True

    calls: list[Callable[[], Any]] = [
        lambda: list(client.list_flights(rng.randbytes(5), options)) or True,
        lambda: client.get_flight_info(descriptor, options),
        lambda: client.get_schema(descriptor, options),
        put,
    ]
    return _answered(rng.choice(calls))


HOSTILE: dict[str, Callable[[Target, random.Random], bool]] = {
    function.__name__.replace("_", " "): function
    for function in (
        noise_on_the_wire,
        noise_for_a_question,
        a_question_with_a_flipped_byte,
        a_question_that_is_cut_off,
        a_question_about_strangers,
        a_question_twice_about_one_sample,
        too_large_a_question,
        a_bad_token,
        a_bad_note,
        an_exchange_out_of_order,
        a_call_that_is_not_offered,
    )
}
"""Kind → a function that sends one such message and says whether it was accepted."""
