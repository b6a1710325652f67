"""A teacher accepts nothing that is malformed, too large, out of order or without a token."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_helpers import ToyTeacher, toy_record
from pyarrow import flight

from slimkit.distill.knowledge import (
    OnlineTeacher,
    Patience,
    Question,
    Trust,
    issue_token,
    serve,
)
from slimkit.distill.knowledge.format.encoding import columns_of, encode, ids_of
from slimkit.distill.knowledge.format.question import Ask, pack_ask, read_ask
from slimkit.distill.knowledge.format.schema import KnowledgeSchema
from slimkit.distill.knowledge.online import serving
from slimkit.errors import DataError, SlimkitError, TeacherError

ROOT = Path(__file__).resolve().parents[3]
SECRET = b"a secret of enough bytes"
KINDS = (
    "noise on the wire", "noise for a question", "a question with a flipped byte",
    "a question that is cut off", "a question about strangers",
    "a question twice about one sample", "too large a question", "a bad token", "a bad note",
    "an exchange out of order", "a call that is not offered",
)  # fmt: skip


class CheckingTeacher(ToyTeacher):
    """Knows its samples, as a network teacher does."""

    def answer(self, ids: np.ndarray, *rest: Any) -> pa.RecordBatch:
        if ids.min() < 0 or ids.max() >= self.schema.samples:
            raise DataError("there is no such sample", where="ask")
        return super().answer(ids, *rest)


@pytest.fixture(scope="module")
def hostile() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.knowledge_hostile")
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def target(hostile: Any) -> Iterator[Any]:
    with serve(CheckingTeacher(passes=4), secret=SECRET) as server:
        yield hostile.Target.at(server.port, SECRET, server.teacher.schema)
        # it still does its work
        trust = Trust(token=issue_token(SECRET, 60))
        teacher = OnlineTeacher(server.address, trust=trust, patience=Patience(2.0, 3.0))
        (found,) = teacher.stream([Question(np.arange(9))], 1, ["logits"])
        assert found["logits"].equal(toy_record(np.arange(9), 1, 3))


def test_all_kinds_are_tried(hostile: Any) -> None:
    assert set(hostile.HOSTILE) == set(KINDS)


@settings(max_examples=300, derandomize=True)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
def test_no_such_message_is_accepted(hostile: Any, target: Any, kind: str, seed: int) -> None:
    assert not hostile.HOSTILE[kind](target, random.Random(seed))
    assert hostile.good_question(target, random.Random(seed))


@settings(max_examples=200, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_question_or_an_error(data: bytes) -> None:
    schema = ToyTeacher().schema
    for candidate in (data, b"SKA1\0\0\0\0" + data):
        try:
            ask = read_ask(schema, candidate, 16)
        except DataError:
            continue
        assert pack_ask(schema, ask) == candidate
        assert len(ask.ids) <= 16


def test_a_question_survives() -> None:
    schema = ToyTeacher().schema
    ask = Ask(7, ("logits",), np.array([5, 0, 3]))
    again = read_ask(schema, pack_ask(schema, ask), 3)
    assert (again.number, again.names, again.ids.tolist()) == (7, ("logits",), [5, 0, 3])
    with pytest.raises(DataError, match="3 samples at once, at most 2"):
        read_ask(schema, pack_ask(schema, ask), 2)


def test_a_student_takes_no_larger_message_than_was_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tell(self: Any, context: Any, ticket: Any) -> Any:
        ids = np.arange(300_000)
        batch = encode(self._owner.teacher.schema, ids, {"logits": torch.zeros(len(ids), 3)})
        return flight.GeneratorStream(batch.schema, iter([batch]))

    monkeypatch.setattr(serving._Flight, "do_get", tell)
    with serve(ToyTeacher()) as server:
        teacher = OnlineTeacher(server.address, patience=Patience(2.0, 30.0))
        with pytest.raises(TeacherError, match=f"{server.address}: its answer breaks off"):
            list(teacher.stream([Question(np.arange(8))], 0, ["logits"]))


def test_a_server_does_not_pass_on_another_schema() -> None:
    with serve(LyingTeacher("wider")) as server:
        teacher = OnlineTeacher(server.address, patience=Patience(2.0, 3.0))
        with pytest.raises(TeacherError, match=f"{server.address}: teacher: another schema"):
            list(teacher.stream([Question(np.arange(8))], 0, ["logits"]))


class LyingTeacher(ToyTeacher):
    """Announces one thing and sends another."""

    def __init__(self, lie: str) -> None:
        super().__init__()
        self.lie = lie

    def answer(self, ids: np.ndarray, number: int, *rest: Any) -> pa.RecordBatch:
        batch = super().answer(ids, number, *rest)
        if self.lie == "nothing":
            return batch.slice(0, 0)
        if self.lie == "fewer":
            return batch.slice(1)
        if self.lie == "others":
            return super().answer(ids + 1, number, *rest)
        if self.lie == "doubled":
            return super().answer(np.concatenate([ids, ids]), number, *rest)
        if self.lie == "wider":
            other = ToyTeacher(classes=4)
            return other.answer(ids, number, *rest)
        if self.lie == "gaps":
            column = pa.array([None] * len(ids), batch.schema.field(1).type)
            fields = [batch.schema.field(0), batch.schema.field(1).with_nullable(True)]
            return pa.RecordBatch.from_arrays([batch.column(0), column], schema=pa.schema(fields))
        values = pa.array(np.full(3 * len(ids), np.nan, np.float32))
        column = pa.FixedSizeListArray.from_arrays(values, type=batch.schema.field(1).type)
        return pa.RecordBatch.from_arrays([batch.column(0), column], schema=batch.schema)


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("nothing", "about no samples"),
        ("fewer", "about other samples"),
        ("others", "about other samples"),
        ("doubled", "about other samples"),
        ("wider", "another schema than announced"),
        ("gaps", "another schema than announced"),
        ("nan", "not finite"),
    ],
)
def test_a_student_believes_no_lie(lie: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(self: Any, context: Any, ticket: Any) -> Any:
        batch = self._answer(self._read(ticket.ticket), None)
        return flight.GeneratorStream(batch.schema, iter([batch]))

    monkeypatch.setattr(serving._Flight, "do_get", tell)  # an honest server would notice
    with serve(LyingTeacher(lie)) as server:
        teacher = OnlineTeacher(server.address, patience=Patience(2.0, 3.0))
        with pytest.raises((TeacherError, DataError), match=f"{server.address}.*{message}"):
            list(teacher.stream([Question(np.arange(8))], 0, ["logits"]))


@settings(max_examples=300, derandomize=True)
@given(place=st.integers(0, 10**6), value=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_message_is_an_error_or_has_the_announced_shape(
    place: int, value: int, cut: bool
) -> None:
    toy = ToyTeacher()
    batch = encode(toy.schema, np.arange(6), {"logits": toy_record(np.arange(6), 0, 3)})
    data = bytearray(batch.serialize().to_pybytes())
    place %= len(data)
    data = data[:place] if cut else data
    if not cut:
        data[place] ^= value
    try:
        damaged = pa.ipc.read_record_batch(bytes(data), batch.schema)
        ids = ids_of(damaged, toy.schema.arrow(), "here")
        columns = columns_of(damaged, "here")
    except (SlimkitError, pa.ArrowException, OSError):
        return
    assert columns["logits"].shape[1:] == (3,)
    assert len(columns["logits"]) == len(ids)


def test_a_damaged_description_is_refused() -> None:
    good = ToyTeacher().schema.arrow()
    for text in (b"", b"{}", b"[" * 1000, b'{"version": 2}', b"\xff"):
        schema = good.with_metadata({b"slimkit.knowledge": text})
        with pytest.raises(DataError, match="here: the description"):
            KnowledgeSchema.from_arrow(schema, "here")
    huge = ToyTeacher().schema.model_dump_json().replace("[3]", "[100000,100000]")
    schema = good.with_metadata({b"slimkit.knowledge": huge.encode()})
    with pytest.raises(DataError, match="bytes per sample"):
        KnowledgeSchema.from_arrow(schema, "here")


@pytest.mark.parametrize(
    "liked",
    [
        b'{"batch_size": Infinity, "parallel": 1}',
        b'{"batch_size": 1e999, "parallel": 1}',
        b'{"batch_size": ' + b"9" * 5000 + b', "parallel": 1}',
        b"[" * 100_000,
        b'{"batch_size": null, "parallel": 1}',
        b"[]",
        b"\xff",
    ],
)
def test_a_lie_about_how_a_teacher_likes_to_be_asked_names_the_teacher(
    liked: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def description(self: Any) -> Any:
        found = self._owner.teacher.schema.arrow()
        return found.with_metadata({**found.metadata, serving.SERVING: liked}).serialize()

    monkeypatch.setattr(serving._Flight, "_description", description)
    with serve(ToyTeacher()) as server, pytest.raises(TeacherError) as caught:
        OnlineTeacher(server.address, patience=Patience(0.5, 0.5)).schema  # noqa: B018 - asks
    assert server.address in str(caught.value)
