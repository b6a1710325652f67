"""Offline knowledge: a folder of Arrow files (shards) and an index.

``index.json`` says what the knowledge is and lists every finished shard with its size and its
SHA-256. A shard holds a fixed range of the ascending sample numbers of one pass, so that an
interrupted dump goes on with the shards that are missing and ends with the same files.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slimkit.artifact import PathLike, atomic_file, content_hash, read_json, write_json
from slimkit.distill.knowledge.format.schema import KnowledgeSchema
from slimkit.errors import DataError
from slimkit.locking import file_lock

__all__ = ["INDEX", "Index", "KnowledgeWriter", "Shard", "ShardFile", "read_index"]

INDEX = "index.json"
"""The file of a folder of knowledge that lists its shards."""


class ShardFile(BaseModel):
    """A finished shard, as the index lists it.

    Attributes:
        file: path below the folder.
        number: of the pass.
        rows: samples in it.
        bytes: size of the file.
        sha256: of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(pattern=r"^pass-\d{3,}/shard-\d{5,}\.arrow$")
    number: int = Field(ge=0)
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str


class Index(BaseModel):
    """The contents of ``index.json``.

    Attributes:
        format: of the folder.
        description: what the knowledge is.
        shard_rows: samples per shard.
        ids_sha256: of all sample numbers.
        shards: the finished ones.
        complete: whether all are there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["slimkit-knowledge-1"] = "slimkit-knowledge-1"
    description: KnowledgeSchema
    shard_rows: int = Field(ge=1)
    ids_sha256: str
    shards: tuple[ShardFile, ...] = ()
    complete: bool = False


def read_index(folder: Path) -> Index:
    """Read ``index.json``.

    Raises:
        DataError: there is none, or it is damaged.
        ArtifactError: it cannot be read.
    """
    path = folder / INDEX
    if not path.exists():
        raise DataError(
            f"there is no {INDEX} in it, so it is no knowledge",
            where=str(folder),
            hint="write it with: slimkit teach dump",
        )
    try:
        return Index.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"the index is damaged: {place}: {first['msg']}", where=str(path)
        ) from error


@dataclass(frozen=True)
class Shard:
    """A shard that is to be written.

    Attributes:
        file: path below the folder.
        number: of the pass.
        ids: of its samples, ascending.
    """

    file: str
    number: int
    ids: NDArray[np.int64]


class KnowledgeWriter:
    """Writes shards one by one; what is finished survives whatever happens to the rest.

    Args:
        folder: of the knowledge; created, or continued if the same knowledge is begun in it.
        description: what is written; ``passes`` must be a number.
        ids: of all samples.
        shard_rows: samples per shard.

    Raises:
        DataError: other knowledge is in the folder already; nothing is changed.
        ArtifactError: another process writes it, or it cannot be written.
    """

    def __init__(
        self,
        folder: PathLike,
        description: KnowledgeSchema,
        ids: NDArray[np.int64],
        *,
        shard_rows: int = 4096,
    ) -> None:
        self.folder = Path(folder)
        self.ids = np.unique(ids)
        if len(self.ids) < len(ids):
            raise DataError("a sample is there twice", where="ids")
        if description.passes is None:
            raise DataError("a file has a limited number of passes", where="passes")
        self.index = Index(
            description=description.model_copy(update={"samples": len(self.ids)}),
            shard_rows=shard_rows,
            ids_sha256=hashlib.sha256(self.ids.tobytes()).hexdigest(),
        )
        if (self.folder / INDEX).exists():
            self.index = self._continued(read_index(self.folder))
        else:
            self._save()

    def plan(self) -> list[Shard]:
        """All shards, finished or not."""
        rows, passes = self.index.shard_rows, self.index.description.passes or 1
        return [
            Shard(f"pass-{number:03d}/shard-{part:05d}.arrow", number, self.ids[start:][:rows])
            for number in range(passes)
            for part, start in enumerate(range(0, len(self.ids), rows))
        ]

    def missing(self) -> list[Shard]:
        """Shards that are not finished, or whose file has gone or changed its size."""
        sizes = {shard.file: shard.bytes for shard in self.index.shards}
        return [s for s in self.plan() if _size(self.folder / s.file) != sizes.get(s.file, -1)]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out of the folder while inside.

        Raises:
            ArtifactError: one is at work.
        """
        busy = "another process writes into it"
        with file_lock(self.folder / ".lock", patience=0, busy=busy, where=self.folder):
            yield

    def write(self, shard: Shard, batches: Iterable[pa.RecordBatch]) -> None:
        """Write one shard and list it in the index.

        Args:
            shard: from :meth:`missing`.
            batches: its knowledge, in the order of its numbers.

        Raises:
            DataError: the batches are not of these samples; nothing is written.
            ArtifactError: the disk is full, or not writable.
        """
        path = self.folder / shard.file
        with atomic_file(path) as temporary:
            writer_schema = self.index.description.arrow()
            table = pa.Table.from_batches(list(batches)).combine_chunks()
            found = table.column(0).to_numpy()
            if not np.array_equal(found, shard.ids):
                raise DataError(
                    f"the teacher answered {len(found)} samples where {len(shard.ids)} were asked",
                    where=self.index.description.teacher or "teacher",
                )
            with (
                pa.OSFile(str(temporary), "wb") as sink,
                pa.ipc.new_file(sink, writer_schema) as writer,
            ):
                writer.write_table(pa.Table.from_arrays(table.columns, schema=writer_schema))
            with temporary.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            entry = ShardFile(
                file=shard.file,
                number=shard.number,
                rows=len(shard.ids),
                bytes=temporary.stat().st_size,
                sha256=digest,
            )
        others = [known for known in self.index.shards if known.file != shard.file]
        listed = tuple(sorted([*others, entry], key=lambda known: known.file))
        self.index = self.index.model_copy(update={"shards": listed})
        self._save()

    def finish(self) -> Index:
        """Declare the knowledge complete.

        Raises:
            DataError: a shard is missing.
        """
        missing = self.missing()
        if missing:
            raise DataError(f"{len(missing)} shards are missing", where=str(self.folder))
        self.index = self.index.model_copy(update={"complete": True})
        self._save()
        return self.index

    def _save(self) -> None:
        write_json(self.folder / INDEX, self.index.model_dump(mode="json"))

    def _continued(self, found: Index) -> Index:
        """The index that is there, if it is of the same knowledge."""
        ours, theirs = _identity(self.index), _identity(found)
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        if differing:
            shown = ", ".join(
                f"{key} {_short(theirs.get(key))} there, {_short(ours[key])} now"
                for key in differing[:3]
            )
            raise DataError(
                f"other knowledge is in it: {shown}",
                where=str(self.folder),
                hint="choose another folder, or delete this one",
            )
        return found


def _identity(index: Index) -> dict[str, Any]:
    rest = {"shard_rows": index.shard_rows, "ids": index.ids_sha256[:12]}
    return {**index.description.model_dump(mode="json"), **rest}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{content_hash(value)[:12]} ({len(text)} characters)"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
