"""Reading offline knowledge: samples by number, from files that are mapped into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimkit.artifact import PathLike
from slimkit.distill.knowledge.format.encoding import Columns, columns_of, decode, ids_of
from slimkit.distill.knowledge.format.question import Question
from slimkit.distill.knowledge.format.store import ShardFile, read_index
from slimkit.errors import DataError

__all__ = ["KnowledgeFiles"]


@dataclass(frozen=True)
class _Pass:
    """Where the samples of one pass lie.

    Attributes:
        ids: all numbers, ascending.
        shard, row: of each of them.
        columns: of every shard.
    """

    ids: NDArray[np.int64]
    shard: NDArray[np.int64]
    row: NDArray[np.int64]
    columns: tuple[Columns, ...]


class KnowledgeFiles:
    """A folder that ``slimkit teach dump`` wrote.

    Args:
        folder: with ``index.json``.

    Attributes:
        name: what errors call it.
        schema: what is in it.
        identity: a hash of all of its contents.

    Raises:
        DataError: it is no knowledge, is not finished, or a shard is cut off or missing.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        self.name = f"file:{self.folder}"
        index = read_index(self.folder)
        if not index.complete:
            raise DataError(
                f"the dump is not finished: {len(index.shards)} shards are there",
                where=self.name,
                hint="start the same dump again, it goes on where it was",
            )
        self.schema = index.description
        self.shards = index.shards
        self.identity = hashlib.sha256(index.model_dump_json().encode()).hexdigest()
        for shard in self.shards:
            self._check_size(shard)
        self._passes: dict[int, _Pass] = {}

    def verify(self) -> None:
        """Compare every shard with its SHA-256: reads everything.

        Raises:
            DataError: a shard has changed since it was written.
        """
        for shard in self.shards:
            with (self.folder / shard.file).open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != shard.sha256:
                raise DataError(
                    "the shard has changed since it was written",
                    where=str(self.folder / shard.file),
                    hint="delete it and start the same dump again",
                )

    def rows(
        self, ids: NDArray[np.int64], number: int, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Knowledge of some samples.

        Args:
            ids: (B,) numbers of samples, in any order.
            number: of the pass; with fewer passes in the files it wraps around.
            names: keys; all by default.

        Returns:
            Key → (B, …).

        Raises:
            DataError: a sample is not in the files, or a shard is damaged.
        """
        found = self._pass(number % (self.schema.passes or 1))
        places = np.searchsorted(found.ids, ids).clip(max=len(found.ids) - 1)
        strange = ids[found.ids[places] != ids]
        if len(strange):
            raise DataError(
                f"it knows nothing of {len(strange)} samples, the first is {strange[0]}",
                where=self.name,
                hint="the knowledge is of another split?",
            )
        wanted = self.schema.names if names is None else names
        fields = [f.name for name in wanted for f in self.schema.key(name, self.name).fields()]
        shards, rows = found.shard[places], found.row[places]
        return decode(self.schema, wanted, _gathered(found, shards, rows, fields), self.name)

    def stream(
        self, questions: Iterable[Question], number: int, names: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """:meth:`rows` of one question after the other."""
        return (self.rows(question.ids, number, names) for question in questions)

    def close(self) -> None:
        """Let go of the mapped files."""
        self._passes.clear()

    def _check_size(self, shard: ShardFile) -> None:
        path = self.folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} of {shard.bytes} bytes"
            raise DataError(
                f"the shard {state}",
                where=str(path),
                hint="start the same dump again: it writes what is missing or cut off",
            )

    def _pass(self, number: int) -> _Pass:
        if number not in self._passes:
            shards = [shard for shard in self.shards if shard.number == number]
            if not shards:
                raise DataError(f"it has no pass {number}", where=self.name)
            opened = [self._open(shard) for shard in shards]
            columns = tuple(columns for _, columns in opened)
            counts = [shard.rows for shard in shards]
            ids = np.concatenate([numbers for numbers, _ in opened])
            order = np.argsort(ids, kind="stable")
            shard_of = np.repeat(np.arange(len(shards)), counts)
            row_of = np.concatenate([np.arange(count) for count in counts])
            if len(ids) != self.schema.samples or bool((np.diff(ids[order]) == 0).any()):
                raise DataError(
                    f"pass {number} has {len(ids)} samples, announced were {self.schema.samples}",
                    where=self.name,
                )
            self._passes[number] = _Pass(ids[order], shard_of[order], row_of[order], columns)
        return self._passes[number]

    def _open(self, shard: ShardFile) -> tuple[NDArray[np.int64], Columns]:
        path = str(self.folder / shard.file)
        try:
            with pa.ipc.open_file(pa.memory_map(path)) as reader:
                table = reader.read_all()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"not a complete Arrow file: {error}", where=path) from error
        batches = table.to_batches()
        if len(batches) != 1 or len(table) != shard.rows:
            raise DataError(f"{len(table)} samples, expected {shard.rows}", where=path)
        return ids_of(batches[0], self.schema.arrow(), path), columns_of(batches[0], path)


def _gathered(
    found: _Pass, shards: NDArray[np.int64], rows: NDArray[np.int64], fields: Sequence[str]
) -> Columns:
    """The rows of all wanted columns, in own memory."""
    touched = np.unique(shards).tolist()
    places = {shard: torch.from_numpy(np.flatnonzero(shards == shard)) for shard in touched}
    chosen = torch.from_numpy(rows)
    own: Columns = {}
    for name in fields:
        columns = [found.columns[shard][name] for shard in touched]
        if len(touched) == 1:
            own[name] = columns[0].index_select(0, chosen)
            continue
        own[name] = columns[0].new_empty((len(rows), *columns[0].shape[1:]))
        for shard, column in zip(touched, columns, strict=True):
            place = places[shard]
            own[name][place] = column.index_select(0, chosen[place])
    return own
