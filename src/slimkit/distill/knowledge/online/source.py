"""An online teacher as a source of knowledge: pipelined questions, in the student's order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from slimkit.distill.knowledge.format.question import MAX_ASK_ROWS, Question
from slimkit.distill.knowledge.online.connecting import Connection, Patience, Trust
from slimkit.distill.recording.records import Records

__all__ = ["OnlineTeacher", "cut"]

_CALL_BYTES = 2**22
"""Bytes of one call's answer at most: 4 MiB, by which the cost of a call no longer matters."""
_QUICK, _SLOW = 0.02, 0.2
"""Seconds of a call: below, the next one asks for twice as much; above, for half."""


class OnlineTeacher:
    """A teacher in another process, on this machine or elsewhere.

    Args:
        address: ``grpc://host:port`` or ``grpc+tls://host:port``.
        trust: token and certificates; None takes them from the environment.
        patience: how long to wait for it.
        state: answers what the teacher asks about the student, ``about -> JSON``.

    Attributes:
        name: its address.
        schema: what it knows.
        batch_size: samples that it likes to be asked for at once.

    Raises:
        TeacherError: it does not answer in time, or refuses the token.
    """

    def __init__(
        self,
        address: str,
        *,
        trust: Trust | None = None,
        patience: Patience | None = None,
        state: Callable[[str], Any] | None = None,
    ) -> None:
        self.name = address
        self._connection = Connection(
            address, trust or Trust.from_environment(), patience or Patience(), state
        )
        self.schema = self._connection.schema
        self.batch_size = self._connection.batch_size

    def tell(self, name: str, value: Any) -> None:
        """Send a named JSON value to the teacher."""
        self._connection.tell(name, value)

    def stream(
        self, questions: Iterable[Question], number: int, names: Sequence[str]
    ) -> Iterator[Records]:
        """Answers in the order of the questions.

        As many questions are under way as the teacher works on at once, and one more; nothing
        more is asked while the caller does not take what is there.

        Args:
            questions: of any size, independent of the teacher's batch size.
            number: of the pass.
            names: keys that are wanted.

        Yields:
            Key → (B, …) for each question.

        Raises:
            TeacherError: see :class:`slimkit.distill.knowledge.online.connecting.Connection`.
        """
        ahead = self._connection.parallel + 1
        pace = _Pace(self._connection)
        sizes: deque[int] = deque()
        asked: deque[Future[Records]] = deque()

        def ask(chunk: Question) -> Records:
            started = time.perf_counter()
            found = self._connection.fetch(chunk, number, names)
            pace.took(len(chunk.ids), time.perf_counter() - started)
            return found

        def answers(pool: ThreadPoolExecutor) -> Iterator[Records]:
            for chunk in _chunks(questions, pace, sizes):
                asked.append(pool.submit(ask, chunk))
                if len(asked) >= ahead:
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()

        with ThreadPoolExecutor(ahead, "slimkit-ask") as pool:
            try:
                yield from cut(answers(pool), sizes)
            finally:
                for future in asked:
                    future.cancel()

    def close(self) -> None:
        """Stop waiting for the teacher."""
        self._connection.close()


class _Pace:
    """Adaptive batch size of questions, in whole batches of the teacher.

    Where the teacher is quick, calls cost more than answers: several batches then share one. A
    batch always holds the same samples, so that this changes no result.
    """

    def __init__(self, connection: Connection) -> None:
        self.batch = connection.batch_size
        self._most = max(1, _CALL_BYTES // (connection.schema.row_bytes * self.batch))
        self._most = min(self._most, max(1, MAX_ASK_ROWS // self.batch))
        self._batches = 1

    @property
    def rows(self) -> int:
        """Samples of the next question."""
        return self.batch * self._batches

    def took(self, rows: int, seconds: float) -> None:
        """Learn from an answer."""
        batches = max(1, rows // self.batch)
        if seconds < _QUICK and batches == self._batches:
            self._batches = min(2 * batches, self._most)
        elif seconds > _SLOW:
            self._batches = max(1, min(self._batches, batches // 2))


def _chunks(questions: Iterable[Question], pace: _Pace, sizes: deque[int]) -> Iterator[Question]:
    """Questions regrouped at the teacher's pace; notes in ``sizes`` how to undo it."""
    waiting: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    count = 0
    for question in questions:
        sizes.append(len(question.ids))
        if question.inputs is not None:
            size = pace.batch
            for start in range(0, len(question.ids), size):
                part = {k: v[start : start + size] for k, v in question.inputs.items()}
                yield Question(question.ids[start : start + size], part)
            continue
        waiting.append(question.ids)
        count += len(question.ids)
        while count >= pace.rows:
            ids, size = np.concatenate(waiting), pace.rows
            yield Question(ids[:size])
            waiting, count = [ids[size:]], count - size
    if count:
        yield Question(np.concatenate(waiting))


def cut(parts: Iterator[Records], sizes: deque[int]) -> Iterator[Records]:
    """Rows of the parts regrouped to the sizes, which grow while parts are made."""
    held: list[Records] = []
    count = 0
    for part in parts:
        held.append(part)
        count += _rows(part)
        if not sizes or count < sizes[0]:
            continue
        whole = held[0] if len(held) == 1 else _joined(held)
        start = 0
        while sizes and sizes[0] <= count:
            size = sizes.popleft()
            if size == _rows(whole):
                yield whole
            else:
                yield {name: rows[start : start + size] for name, rows in whole.items()}
            start, count = start + size, count - size
        held = [{name: rows[start:] for name, rows in whole.items()}] if count else []


def _rows(part: Records) -> int:
    return int(next(iter(part.values())).shape[0])


def _joined(parts: Sequence[Records]) -> Records:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
