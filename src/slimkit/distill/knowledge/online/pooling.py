"""A pool of replicas of one teacher: each answers about its part of the samples (sharding)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimkit.distill.knowledge.format.encoding import encode
from slimkit.distill.knowledge.format.question import Question
from slimkit.distill.knowledge.online.connecting import LostTeacherError, Patience, Trust
from slimkit.distill.knowledge.online.serving import TLSFiles, serve
from slimkit.distill.knowledge.online.source import OnlineTeacher
from slimkit.distill.knowledge.teaching import NetworkTeacher
from slimkit.errors import (
    DataError,
    InputError,
    MissingDependencyError,
    TeacherError,
)

__all__ = ["TeacherPool", "ray_pool"]

_SHORT = 3.0
"""Seconds after which a silent teacher is looked for at another address."""


class TeacherPool:
    """Several online teachers that know the same, as one source of knowledge.

    The ascending numbers of the samples are cut into parts as equal as they can be; the rest of
    an uneven division goes to the first parts. A teacher that dies may come back at another
    address: it is looked up again, and what it had not answered is asked again.

    Also a :class:`slimkit.distill.knowledge.Teacher`, so that :func:`serve` makes one address
    of the pool.

    Args:
        ids: numbers of all samples.
        addresses: where each teacher is now; called again when it no longer answers.
        trust: token and certificates.
        patience: how long to wait for a teacher to come back.
        name: what errors call it.

    Attributes:
        schema: what all of them know.
        parts: the numbers that each answers about.

    Raises:
        InputError: no teacher.
        DataError: the teachers differ.
        TeacherError: one does not answer.
    """

    def __init__(
        self,
        ids: NDArray[np.int64],
        addresses: Sequence[Callable[[], str]],
        *,
        trust: Trust | None = None,
        patience: Patience | None = None,
        name: str = "pool",
    ) -> None:
        if not addresses:
            raise InputError("a pool needs a teacher", where=name)
        self.name = name
        self._ids = np.unique(ids)
        parts = np.array_split(self._ids, len(addresses))
        self.parts = [part for part in parts if len(part)]
        self._members: list[_Member] = []
        try:
            for address, _ in zip(addresses, self.parts, strict=False):
                member = _Member(address, trust, patience or Patience())
                self._members.append(member)
                first = self._members[0].teacher
                if member.teacher.schema != first.schema:
                    raise DataError(
                        f"it is another teacher than {first.name}", where=member.teacher.name
                    )
        except BaseException:
            self.close()
            raise
        self.schema = self._members[0].teacher.schema
        self.parallel = len(self._members)
        self.batch_size = sum(member.teacher.batch_size for member in self._members)

    def stream(
        self, questions: Iterable[Question], number: int, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Answers in the order of the questions; all teachers work at the same time.

        Raises:
            DataError: a sample is of no part.
            TeacherError: a teacher did not come back in time.
        """
        listed = list(questions)
        owners = [self._owners(question.ids) for question in listed]
        streams = [
            member.stream([q.ids[o == place] for q, o in zip(listed, owners, strict=True)],
                          number, names)
            for place, member in enumerate(self._members)
        ]  # fmt: skip
        for question, owner in zip(listed, owners, strict=True):
            yield _assembled(question.ids, owner, {p: next(streams[p]) for p in np.unique(owner)})

    def answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> pa.RecordBatch:
        """See :class:`slimkit.distill.knowledge.Teacher`."""
        if inputs is not None:
            raise DataError("the teachers have their own inputs", where="inputs")
        (found,) = self.stream([Question(ids)], number, names)
        return encode(self.schema, ids, found, where=self.name)

    def close(self) -> None:
        """Stop waiting for the teachers."""
        for member in self._members:
            member.teacher.close()

    def _owners(self, ids: NDArray[np.int64]) -> NDArray[np.intp]:
        lasts = np.array([part[-1] for part in self.parts])
        places = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        strange = ids[self._ids[places] != ids]
        if len(strange):
            raise DataError(f"there is no sample {strange[0]}", where=self.name)
        return np.searchsorted(lasts, ids)


class _Member:
    """One teacher of a pool, wherever it is at the moment."""

    def __init__(self, address: Callable[[], str], trust: Trust | None, patience: Patience) -> None:
        self._address, self._trust, self._patience = address, trust, patience
        self.teacher = self._found()

    def stream(
        self, batches: Sequence[NDArray[np.int64]], number: int, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Knowledge for every batch that is not empty."""
        left = [Question(ids) for ids in batches if len(ids)]
        while left:
            done = 0
            try:
                for answer in self.teacher.stream(left, number, names):
                    done += 1
                    yield answer
                return
            except LostTeacherError:
                left = left[done:]
                schema = self.teacher.schema
                self.teacher = self._found()
                if self.teacher.schema != schema:
                    raise DataError(
                        "another teacher has taken its place", where=self.teacher.name
                    ) from None

    def _found(self) -> OnlineTeacher:
        """The teacher at its present address, waiting for it to come back."""
        deadline = time.monotonic() + self._patience.lost
        short = replace(self._patience, lost=min(_SHORT, self._patience.lost))
        while True:
            try:
                return OnlineTeacher(self._address(), trust=self._trust, patience=short)
            except LostTeacherError:
                if time.monotonic() > deadline:
                    raise


def _assembled(
    ids: NDArray[np.int64], owner: NDArray[np.intp], parts: Mapping[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Rows of several teachers in the order in which they were asked for."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    whole: dict[str, Tensor] = {}
    for place, part in parts.items():
        rows = torch.from_numpy(np.flatnonzero(owner == place))
        for name, record in part.items():
            if name not in whole:
                whole[name] = record.new_empty((len(ids), *record.shape[1:]))
            whole[name][rows] = record
    return whole


class _Worker:
    """What runs in a Ray actor: a teacher and its server."""

    def __init__(self, build: Callable[[], NetworkTeacher], options: Mapping[str, Any]) -> None:
        import ray

        self.teacher = build()
        host = str(ray.util.get_node_ip_address())
        self.server = serve(self.teacher, host=host, **options)

    def address(self) -> str:
        return self.server.address

    def ids(self) -> NDArray[np.int64]:
        return self.teacher.ids


def ray_pool(
    build: Callable[[], NetworkTeacher],
    teachers: int,
    *,
    secret: bytes | None = None,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    trust: Trust | None = None,
    patience: Patience | None = None,
    actor_options: Mapping[str, Any] | None = None,
) -> TeacherPool:
    """Teachers on a Ray cluster, restarted where they die; knowledge itself goes over Flight.

    Args:
        build: makes a teacher; runs in every actor, so it must be importable there.
        teachers: how many actors.
        secret: of their servers; see :class:`TeacherServer`.
        tls: of their servers.
        insecure: let their servers do without both, in a network of their own.
        trust: of the student, with a token from the secret.
        patience: how long to wait for a teacher to start, or to come back when it died.
        actor_options: for ``ray.remote``, such as ``{"num_gpus": 1}``.

    Returns:
        The pool; Ray is left as it is found, or is started on this machine if it is not running.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: not one teacher.
        TeacherError: an actor cannot be started, or finds no free place in time.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "ray is not installed", where="ray_pool", hint="pip install 'slimkit[distributed]'"
        ) from error
    if teachers < 1:
        raise InputError(f"must be at least 1, got {teachers}", where="teachers")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    options = {"secret": secret, "tls": tls, "insecure": insecure}
    remote = ray.remote(max_restarts=-1, max_task_retries=-1, **(actor_options or {}))(_Worker)
    wait = (patience or Patience()).lost
    try:
        actors = [remote.remote(build, options) for _ in range(teachers)]
        ids = np.asarray(_told(actors[0].ids, wait), np.int64)
        addresses = [lambda actor=actor: _told(actor.address, wait) for actor in actors]
        return TeacherPool(ids, addresses, trust=trust, patience=patience, name="ray pool")
    except ray.exceptions.RayError as error:
        raise TeacherError(
            f"a teacher cannot be started: {str(error).strip().rpartition(chr(10))[2]}",
            where="ray_pool",
        ) from error


def _told(method: Any, seconds: float) -> Any:
    """What an actor says; it may still be starting, or starting again."""
    import ray

    try:
        return ray.get(method.remote(), timeout=seconds)
    except ray.exceptions.GetTimeoutError as error:
        raise LostTeacherError(
            f"a teacher has not started within {seconds:g} s",
            where="ray_pool",
            hint="where the cluster has no free CPU or GPU it waits for one: fewer teachers, or "
            'actor_options={"num_cpus": 0}',
        ) from error
