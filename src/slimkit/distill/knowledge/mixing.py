"""Knowledge: any number of teachers, online or in files, as one iterator over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimkit.distill.knowledge.format.question import Question
from slimkit.distill.knowledge.merging import Merge, check_merge, merge
from slimkit.distill.knowledge.online.connecting import Patience, Trust
from slimkit.distill.knowledge.online.fetching import Fetching, Source
from slimkit.distill.knowledge.online.source import OnlineTeacher
from slimkit.distill.knowledge.reading import KnowledgeFiles
from slimkit.distill.recording.records import Records
from slimkit.errors import DataError, InputError, TeacherError, nearest

__all__ = ["Knowledge", "open_source"]


class Knowledge:
    """What several teachers say about the samples of a student.

    ::

        with Knowledge(["file:knowledge", "grpc://127.0.0.1:5005"], merge="mean") as knowledge:
            for ids, answers in knowledge.stream(batches_of_ids, number=epoch):
                answers["logits"]  # (B, classes)

    Args:
        sources: ``file:DIR``, ``grpc://host:port``, ``grpc+tls://host:port``, or sources.
        merge: how keys that several teachers have become one; keys that one has are united.
        trust: token and certificates for all online teachers.
        patience: how long to wait for them.
        prefetch: batches per teacher that wait for the student; nothing more is asked for.
        state: answers what a teacher asks about the student, ``about -> JSON``.

    Attributes:
        sources: in the order given.
        names: keys of all of them together.
        fingerprint: of the samples; empty where no teacher has samples of its own.
        classes: as the teachers name them; empty where none does.
        seed, passes: of the random changes of the samples; passes is None where any number is.

    Raises:
        DataError: the teachers do not fit each other, or a file is damaged.
        TeacherError: one does not answer.
        InputError: an address or a rule is wrong.
    """

    def __init__(
        self,
        sources: Sequence[str | Source],
        *,
        merge: Merge = "mean",
        trust: Trust | None = None,
        patience: Patience | None = None,
        prefetch: int = 4,
        state: Callable[[str], Any] | None = None,
    ) -> None:
        if not sources:
            raise InputError("name at least one teacher", where="knowledge", hint="file:DIR")
        check_merge(merge, len(sources))
        self.sources: list[Source] = []
        self._merge: Merge = merge
        self._prefetch = prefetch
        self._running: Fetching | None = None
        try:
            for source in sources:
                opened = (
                    open_source(source, trust=trust, patience=patience, state=state)
                    if isinstance(source, str)
                    else source
                )
                self.sources.append(opened)
            self._check_agreement()
        except BaseException:
            self.close()
            raise
        schemas = [source.schema for source in self.sources]
        self.names = tuple(dict.fromkeys(name for s in schemas for name in s.names))
        self.fingerprint = next((s.fingerprint for s in schemas if s.fingerprint), "")
        self.classes = next((s.classes for s in schemas if s.classes), ())
        self.seed = next((s.seed for s in schemas if s.fingerprint), 0)
        self.passes = min((s.passes for s in schemas if s.passes is not None), default=None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a key for one sample.

        Raises:
            DataError: no teacher has it; with the nearest.
        """
        for source in self.sources:
            if name in source.schema.names:
                return source.schema.key(name, source.name).shape
        raise DataError(
            f"no teacher knows {name!r}", where="knowledge", hint=nearest(name, self.names)
        )

    def check_data(self, fingerprint: str, classes: Sequence[str]) -> None:
        """Make sure that the teachers mean the student's samples and classes.

        Args:
            fingerprint: of the student's samples.
            classes: names, in the order of its outputs.

        Raises:
            DataError: a teacher has others; the error names it.
        """
        for source in self.sources:
            schema = source.schema
            if schema.classes and list(schema.classes) != list(classes):
                raise DataError(
                    f"its classes are not the student's: {_difference(schema.classes, classes)}",
                    where=source.name,
                )
            if schema.fingerprint and schema.fingerprint != fingerprint:
                raise DataError(
                    "its knowledge is of another data set, or of images cut or changed in another "
                    f"way ({schema.fingerprint[:12]}, the student's is {fingerprint[:12]})",
                    where=source.name,
                    hint="both need the same data: settings; only batch sizes may differ",
                )

    def stream(
        self,
        batches: Iterable[NDArray[np.int64] | Question],
        number: int = 0,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], Records]]:
        """Knowledge for the student's batches, fetched ahead of time in the background.

        Args:
            batches: numbers of the samples of each batch, or questions with inputs; read ahead
                of time, too.
            number: of the pass (the epoch); wraps around at ``passes``.
            names: keys that are wanted; all by default.

        Yields:
            ``(ids, key → (B, …))`` for every batch, in order. Only one stream runs at a time:
            the next one ends this.

        Raises:
            DataError, TeacherError: from a teacher, which is named.
        """
        wanted = self.names if names is None else tuple(names)
        for name in wanted:
            self.shape(name)
        if self._running is not None:
            self._running.close()
        if self.passes is not None:
            number %= self.passes
        listed = [b if isinstance(b, Question) else Question(np.asarray(b)) for b in batches]
        self._running = running = Fetching(self.sources, listed, number, wanted, self._prefetch)
        try:
            for question, parts in zip(listed, running, strict=True):
                yield question.ids, self._united(parts, wanted, len(question.ids))
        finally:
            running.close()

    def tell(self, name: str, value: Any, teachers: Sequence[int] | None = None) -> None:
        """Send a named JSON value to the online teachers, or to some of all (by place)."""
        for place, source in enumerate(self.sources):
            if isinstance(source, OnlineTeacher) and (teachers is None or place in teachers):
                source.tell(name, value)

    def close(self) -> None:
        """Stop fetching, and close files and connections."""
        if self._running is not None:
            self._running.stop()
        for source in self.sources:
            source.close()  # wakes those who wait for it
        if self._running is not None:
            self._running.close()

    def __enter__(self) -> Knowledge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _united(self, parts: Sequence[Records], wanted: Sequence[str], rows: int) -> Records:
        merged: Records = {}
        for source, part in zip(self.sources, parts, strict=True):
            for record in part.values():
                if len(record) != rows:
                    raise TeacherError(
                        f"it answered about {len(record)} of {rows} samples", where=source.name
                    )
        for name in wanted:
            having = [place for place, part in enumerate(parts) if name in part]
            merged[name] = merge([parts[p][name] for p in having], self._merge, name, having)
        return merged

    def _check_agreement(self) -> None:
        """All teachers speak of the same samples, and of the same shapes under one name."""
        first: dict[str, tuple[str, Any]] = {}
        for source in self.sources:
            schema = source.schema
            facts: dict[str, Any] = {f"the shape of {k.name}": k.shape for k in schema.keys}
            if schema.fingerprint:
                facts |= {"the data": schema.fingerprint[:12], "the seed": schema.seed}
                facts["the number of samples"] = schema.samples
            if schema.classes:
                facts["the classes"] = schema.classes
            for what, value in facts.items():
                other, before = first.setdefault(what, (source.name, value))
                if before != value:
                    shown = (
                        _difference(value, before)
                        if what == "the classes"
                        else f"{value}, it is {before}"
                    )
                    raise DataError(
                        f"{what} is not that of {other}: {shown}",
                        where=source.name,
                        hint="teachers of one student must know the same samples and classes",
                    )
        self._check_rules()

    def _check_rules(self) -> None:
        """Every rule is of a key that there is, and suits the teachers that have it."""
        having: dict[str, list[int]] = {}
        for place, source in enumerate(self.sources):
            for name in source.schema.names:
                having.setdefault(name, []).append(place)
        rule_of = self._merge
        rules = rule_of if isinstance(rule_of, Mapping) else dict.fromkeys(having, rule_of)
        for name, rule in rules.items():
            if name not in having:
                raise InputError(
                    f"no teacher knows {name!r}", where="merge", hint=nearest(name, having)
                )
            if len(having[name]) == 1:
                continue
            if rule == "confidence" and len(self.shape(name)) != 1:
                raise InputError(
                    f"{name} of shape {self.shape(name)} holds no class scores",
                    where="merge",
                    hint="merge: {logits: confidence} leaves the others to the mean",
                )
            if not isinstance(rule, str) and not sum(rule[place] for place in having[name]):
                raise InputError(f"all teachers that know {name} have weight 0", where="merge")


def open_source(
    address: str,
    *,
    trust: Trust | None = None,
    patience: Patience | None = None,
    state: Callable[[str], Any] | None = None,
) -> Source:
    """The source behind ``file:DIR``, ``grpc://…`` or ``grpc+tls://…``.

    Raises:
        InputError: another kind of address.
        DataError, TeacherError: it is damaged, or does not answer.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "file" and rest:
        return KnowledgeFiles(rest)
    if scheme in {"grpc", "grpc+tls"} and rest.startswith("//"):
        return OnlineTeacher(address, trust=trust, patience=patience, state=state)
    raise InputError(
        f"{address!r} is no place for knowledge",
        where="knowledge",
        hint=nearest(scheme, ("file", "grpc", "grpc+tls"))
        + " Places are file:DIR, grpc://host:port and grpc+tls://host:port",
    )


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    if len(theirs) != len(ours):
        return f"{len(theirs)} there, {len(ours)} here"
    place = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
    return f"number {place} is {theirs[place]!r} there, {ours[place]!r} here"
