"""Writing what a teacher knows to files, shard by shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from slimkit.artifact import PathLike
from slimkit.distill.knowledge.format.store import Index, KnowledgeWriter, Shard
from slimkit.distill.knowledge.teaching import NetworkTeacher
from slimkit.errors import InputError

__all__ = ["dump"]


def dump(
    teacher: NetworkTeacher,
    folder: PathLike,
    *,
    passes: int = 1,
    shard_rows: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Write the knowledge of a teacher about all of its samples.

    What is finished is kept: the same call goes on after an interruption, and ends with the
    same files. With several devices, that many batches are worked on at once.

    Args:
        teacher: with samples.
        folder: created; holds ``index.json`` and ``pass-NNN/shard-NNNNN.arrow``.
        passes: over the samples, each with its own fixed random changes of the images.
        shard_rows: samples per file.
        progress: is called with the number of finished shards and of all.

    Returns:
        The index of the finished knowledge.

    Raises:
        InputError: a number is not positive.
        DataError: other knowledge is in the folder, or the teacher's output is not finite.
        ArtifactError: the disk is full, or another process writes to the folder.
    """
    for name, value in (("passes", passes), ("shard_rows", shard_rows)):
        if value < 1:
            raise InputError(f"must be at least 1, got {value}", where=name)
    description = teacher.schema.model_copy(update={"passes": passes})
    writer = KnowledgeWriter(folder, description, teacher.ids, shard_rows=shard_rows)
    with writer.locked(), ThreadPoolExecutor(teacher.parallel, "slimkit-teach") as pool:
        missing = writer.missing()
        total = len(writer.plan())
        for position, shard in enumerate(missing):
            if progress is not None:
                progress(total - len(missing) + position, total)
            writer.write(shard, _answers(teacher, shard, pool))
        if progress is not None:
            progress(total, total)
        return writer.finish()


def _answers(
    teacher: NetworkTeacher, shard: Shard, pool: ThreadPoolExecutor
) -> Iterator[pa.RecordBatch]:
    """The shard's knowledge in batches, in order, a few ahead."""
    waiting: deque[Future[pa.RecordBatch]] = deque()
    for start in range(0, len(shard.ids), teacher.batch_size):
        ids = shard.ids[start : start + teacher.batch_size]
        waiting.append(pool.submit(teacher.answer, ids, shard.number, teacher.schema.names))
        if len(waiting) > teacher.parallel:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
