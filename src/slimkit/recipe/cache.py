"""The stage cache: results by content, complete or not there at all.

::

    stages/ab/abcdef…/      model/ (weights + plans), or models/NAME/ for several; stage.json
    work/abcdef…/           a stage in progress: its training checkpoint survives a kill
    exports/abcdef…/        exported networks: model.onnx, what lies beside it, files.json
    proofs/…                what was measured of an exported file
    locks/abcdef….lock      held while a stage runs; freed by the kernel if the run dies

Every entry carries SHA-256 checksums of itself and of its files, which are verified on use. An
entry that does not fit them (a flipped bit, an empty file after a power cut, JSON of another
shape) counts as not there: it is told to ``damaged`` and made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import (
    PathLike,
    atomic_directory,
    content_hash,
    file_hash,
    read_json,
    write_json,
)
from slimkit.errors import ArtifactError
from slimkit.locking import file_lock
from slimkit.plan import save
from slimkit.runtime.onnx_files import copy_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Cache", "CacheEntry", "default_cache"]

Damaged = Callable[[str], None]
"""Is told what is wrong with an entry that was found and cannot be used."""

_OTHER_FOLDER = "SLIMKIT_CACHE chooses another folder for the cache"
_FILES = "files.json"
"""Name of the checksums beside a kept file."""


def default_cache() -> Path:
    """``$SLIMKIT_CACHE``, or ``~/.cache/slimkit``."""
    chosen = os.environ.get("SLIMKIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "slimkit"


def _unheard(problem: str) -> None:
    """A listener that does not listen."""


@dataclass(frozen=True)
class CacheEntry:
    """One thing in the cache.

    Attributes:
        kind: ``stages``, ``work``, ``exports`` …: the folder that it is in.
        key: of the stage or file.
        name: of the recipe's stage, where it is known.
        path: a folder, or a file.
        bytes: that it takes on the disk.
        seconds: since it was written.
    """

    kind: str
    key: str
    name: str
    path: Path
    bytes: int
    seconds: float


class Cache:
    """Results of stages under their keys.

    Args:
        root: a folder, which need not be there; None for :func:`default_cache`.
    """

    def __init__(self, root: PathLike | None = None) -> None:
        self.root = Path(root) if root is not None else default_cache()

    def prepare(self) -> None:
        """Make the folder and find out whether it can be written.

        Raises:
            ArtifactError: it cannot.
        """
        with _storing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass

    def find(self, key: str, damaged: Damaged = _unheard) -> dict[str, Any] | None:
        """The record of a finished stage, or None. A damaged entry counts as not there.

        The networks are not read here; see :meth:`check_model`.
        """
        folder = self._entry(key)
        found = _read_sealed(folder / "stage.json", damaged if folder.is_dir() else _unheard)
        if found is None:
            return None
        for name in found["files"]:
            if not (folder / name).is_file():
                damaged(f"{folder / name} is missing")
                return None
        record: dict[str, Any] = found["record"]
        return record

    def check_model(self, key: str, part: str | None = None) -> None:
        """Verify the checksums of a network that :meth:`find` found.

        Raises:
            ArtifactError: a file of it is damaged or missing.
        """
        entry = self._entry(key)
        found = _read_sealed(entry / "stage.json", _unheard)
        folder = self.model_folder(key, part).relative_to(entry)
        files = found["files"] if found is not None else {}
        _verify(entry, {name: files[name] for name in files if folder in Path(name).parents})

    def model_folder(self, key: str, part: str | None = None) -> Path:
        """Where the weights and plans of a finished stage are, or of one of its networks."""
        return self._entry(key) / ("model" if part is None else f"models/{part}")

    def store(
        self, key: str, model: nn.Module | Mapping[str, nn.Module], record: Mapping[str, Any]
    ) -> None:
        """File a finished stage and remove its work folder.

        Args:
            key: of the stage.
            model: what it leaves, or name → network of several; all are filed, or none.
            record: what is known of it.

        Raises:
            ArtifactError: not writable or disk full; the stage then counts as not run.
        """
        folder = self._entry(key)
        for remains in folder.parent.glob(f".{key}.*"):  # of a run that was killed while storing
            shutil.rmtree(remains, ignore_errors=True)
        with atomic_directory(folder) as temporary:
            if isinstance(model, Mapping):
                for part, network in model.items():
                    save(network, temporary / "models" / part)
                record = {**record, "models": list(model)}
            else:
                save(model, temporary / "model")
            files = _checksums(temporary)
            _write_sealed(temporary / "stage.json", {"record": dict(record), "files": files})
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Remove an entry that turned out to be damaged."""
        shutil.rmtree(self._entry(key), ignore_errors=True)

    def work(self, key: str) -> Path:
        """The folder in which the stage works; the same one after a kill."""
        folder = self.root / "work" / key
        with _storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has_work(self, key: str) -> bool:
        """Whether an interrupted run of the stage left something."""
        folder = self.root / "work" / key
        return folder.is_dir() and any(folder.iterdir())

    def reset_work(self, key: str) -> None:
        """Forget what an interrupted run of the stage left."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep other processes from running the same stage at the same time.

        Args:
            key: of the stage.
            waiting: called when another process holds it, before waiting for that one.
        """
        path = self.root / "locks" / f"{key}.lock"
        with file_lock(path, waiting=waiting, hint=_OTHER_FOLDER):
            yield

    def note(self, kind: str, key: str, damaged: Damaged = _unheard) -> Any:
        """A small JSON value kept under ``kind``, or None."""
        path = self.root / kind / f"{key}.json"
        return _read_sealed(path, damaged) if path.exists() else None

    def keep(self, kind: str, key: str, value: object) -> None:
        """Keep a small JSON value under ``kind``."""
        _write_sealed(self.root / kind / f"{key}.json", value)

    def fetch_file(self, kind: str, name: str, target: Path, damaged: Damaged = _unheard) -> bool:
        """Copy a kept ONNX file, and its external data, to ``target``; False if there is none.

        Args:
            kind: of the files.
            name: as given to :meth:`keep_file`.
            target: replaced if the file is there and whole.
            damaged: is told why a file that is there is not taken.

        Raises:
            ArtifactError: ``target`` is not writable.
        """
        source = self.root / kind / name
        if not source.parent.is_dir():
            return False
        files = _read_sealed(source.parent / _FILES, damaged)
        if files is None:
            return False
        try:
            _verify(source.parent, files)
        except ArtifactError as error:
            damaged(str(error))
            return False
        copy_model(source, target)
        return True

    def keep_file(self, kind: str, name: str, source: Path) -> None:
        """Keep a copy of an ONNX file, and of its external data, under ``kind``.

        Args:
            kind: of the files.
            name: ``"KEY/FILE"``: each has a folder of its own, which is replaced as a whole.
            source: the file.
        """
        final = self.root / kind / name
        with atomic_directory(final.parent) as temporary:
            copy_model(source, temporary / final.name)
            _write_sealed(temporary / _FILES, _checksums(temporary))

    def entries(self) -> list[CacheEntry]:
        """Everything that is kept, the oldest first."""
        found = []
        for kind in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if kind.name == "locks" or not kind.is_dir():
                continue
            pattern = "??/*" if kind.name == "stages" else "*"
            found += [self._described(kind.name, path) for path in kind.glob(pattern)]
        return sorted(found, key=lambda entry: -entry.seconds)

    def remove(self, entry: CacheEntry) -> bool:
        """Remove an entry; False if a running stage holds it, or it cannot be removed."""
        lock = self.root / "locks" / f"{entry.key}.lock"
        try:
            with file_lock(lock, patience=0):
                if entry.path.is_dir() and not entry.path.is_symlink():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink(missing_ok=True)
        except (ArtifactError, OSError):
            return False
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
        return True

    def _described(self, kind: str, path: Path) -> CacheEntry:
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        sizes, times = [], [0.0]
        for file in files:
            with contextlib.suppress(OSError):  # a run may finish or remove it meanwhile
                status = file.stat()
                sizes.append(status.st_size)
                times.append(status.st_mtime)
        name = ""
        if kind == "stages":
            sealed = _read_sealed(path / "stage.json", _unheard)
            record = sealed.get("record") if isinstance(sealed, dict) else None
            name = str(record.get("name", "")) if isinstance(record, dict) else "damaged"
        age = max(0.0, time.time() - max(times)) if max(times) else 0.0
        return CacheEntry(kind, path.name.removesuffix(".json"), name, path, sum(sizes), age)

    def _entry(self, key: str) -> Path:
        return self.root / "stages" / key[:2] / key


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"cannot write: {error.strerror or error}",
            where=str(path),
            hint=_OTHER_FOLDER,
        ) from error


def _write_sealed(path: Path, value: object) -> None:
    """Write JSON beside its own checksum, which is of the value as it will be read."""
    try:
        plain = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        plain = value  # which is refused below
    write_json(path, {"sha256": content_hash(plain), "value": plain})


def _read_sealed(path: Path, damaged: Damaged) -> Any:
    """What :func:`_write_sealed` wrote; None if it is anything else."""
    try:
        sealed = read_json(path)
        if isinstance(sealed, dict) and sealed.keys() == {"sha256", "value"}:
            value = sealed["value"]
            if content_hash(value) == sealed["sha256"]:
                return value
    except (ArtifactError, ValueError, RecursionError) as error:
        damaged(f"{path} cannot be read: {type(error).__name__}")
        return None
    damaged(f"{path} does not fit its checksum")
    return None


def _checksums(folder: Path) -> dict[str, str]:
    """Path in ``folder`` → SHA-256 (hex) of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def _verify(folder: Path, files: Mapping[str, str]) -> None:
    """Raise ArtifactError unless all files are there as they were written."""
    if not files:
        raise ArtifactError("the list of its files is empty", where=str(folder))
    for name, expected in files.items():
        if file_hash(folder / name) != expected:
            raise ArtifactError("does not fit its checksum", where=str(folder / name))
