"""Prefetching from several sources at once: one thread and one bounded queue for each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slimkit.distill.knowledge.format.question import Question
from slimkit.distill.knowledge.format.schema import KnowledgeSchema
from slimkit.distill.recording.records import Records
from slimkit.errors import TeacherError

__all__ = ["Fetching", "Source"]

_POLL = 0.1
"""Seconds between two looks at whether the student has stopped."""


class Source(Protocol):
    """One teacher's knowledge, online or offline.

    Attributes:
        name: what errors call it.
        schema: what it knows.
    """

    name: str
    schema: KnowledgeSchema

    def stream(
        self, questions: Iterable[Question], number: int, names: Sequence[str]
    ) -> Iterator[Records]:
        """Key → (B, …) for every question, in order."""

    def close(self) -> None:
        """Let go of files and connections."""


@dataclass(frozen=True)
class _Failure:
    error: BaseException


_Queue = queue.Queue[Records | _Failure | None]
"""Answers, then None; or what went wrong."""


class Fetching:
    """Answers of all sources to the same questions, in order; begins at once.

    Args:
        sources: in the order in which their answers are handed out.
        questions: of the student.
        number: of the pass.
        wanted: keys; each source is asked for those that it has.
        prefetch: answers per source that wait for the student.

    Raises:
        TeacherError: while iterating: a source ended early or goes on after the last question.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        questions: Sequence[Question],
        number: int,
        wanted: Sequence[str],
        prefetch: int,
    ) -> None:
        self._stop = threading.Event()
        self._sources = sources
        self._queues: list[_Queue] = []
        self._threads: list[threading.Thread] = []
        self._count = len(questions)
        for source in sources:
            names = [name for name in wanted if name in source.schema.names]
            waiting: _Queue = queue.Queue(max(1, prefetch))
            self._queues.append(waiting)
            thread = threading.Thread(
                target=self._fetch,
                args=(source, questions, number, names, waiting),
                name=f"slimkit-knowledge {source.name}",
                daemon=True,
            )
            self._threads.append(thread)
            thread.start()

    def __iter__(self) -> Iterator[list[Records]]:
        for position in range(self._count):
            yield [
                self._next(waiting, source, position)
                for waiting, source in zip(self._queues, self._sources, strict=True)
            ]
        for waiting, source in zip(self._queues, self._sources, strict=True):
            if self._taken(waiting) is not None:
                raise TeacherError(f"it goes on after all {self._count} batches", where=source.name)

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stop.set()

    def close(self) -> None:
        """Stop all threads; what they hold is dropped."""
        self.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def _next(self, waiting: _Queue, source: Source, position: int) -> Records:
        item = self._taken(waiting)
        if item is None:
            raise TeacherError(
                f"it ended after {position} of {self._count} batches", where=source.name
            )
        return item

    def _taken(self, waiting: _Queue) -> Records | None:
        while not self._stop.is_set():
            try:
                item = waiting.get(timeout=_POLL)
            except queue.Empty:
                continue
            if isinstance(item, _Failure):
                raise item.error
            return item
        raise TeacherError("a newer stream has ended this one", where="knowledge")

    def _fetch(
        self,
        source: Source,
        questions: Sequence[Question],
        number: int,
        names: Sequence[str],
        waiting: _Queue,
    ) -> None:
        try:
            if names:
                answers = source.stream(self._while_wanted(questions), number, names)
            else:
                answers = iter({} for _ in questions)
            for answer in answers:
                if not self._put(waiting, answer):
                    return
            self._put(waiting, None)
        except BaseException as error:
            self._put(waiting, _Failure(error))

    def _while_wanted(self, questions: Sequence[Question]) -> Iterator[Question]:
        for question in questions:
            if self._stop.is_set():
                return
            yield question

    def _put(
        self,
        waiting: _Queue,
        item: Records | _Failure | None,
    ) -> bool:
        while not self._stop.is_set():
            try:
                waiting.put(item, timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False
