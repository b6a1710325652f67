"""The stage cache: results by content, complete or not there at all.

::

    stages/ab/abcdef…/      model/ (weights + plans), or models/NAME/ for several; stage.json
    work/abcdef…/           a stage in progress: its training checkpoint survives a kill
    exports/abcdef…/        exported networks: model.onnx and what lies beside it
    proofs/…                what was measured of an exported file
    locks/abcdef….lock      held while a stage runs; freed by the kernel if the run dies
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import PathLike, atomic_directory, read_json, write_json
from slimkit.errors import ArtifactError, BackendError
from slimkit.locking import file_lock
from slimkit.plan import save
from slimkit.runtime.onnx_files import copy_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Cache", "default_cache"]

_OTHER_FOLDER = "SLIMKIT_CACHE chooses another folder for the cache"


def default_cache() -> Path:
    """``$SLIMKIT_CACHE``, or ``~/.cache/slimkit``."""
    chosen = os.environ.get("SLIMKIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "slimkit"


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

    def find(self, key: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None. A damaged entry counts as not there."""
        folder = self._entry(key)
        try:
            record = read_json(folder / "stage.json")
        except ArtifactError:
            return None
        if not isinstance(record, dict):
            return None
        folders = [self.model_folder(key, part) for part in record.get("models") or [None]]
        return record if all((each / "plans.json").exists() for each in folders) else None

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
            write_json(temporary / "stage.json", dict(record))
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

    def note(self, kind: str, key: str) -> Any:
        """A small JSON value kept under ``kind``, or None."""
        path = self.root / kind / f"{key}.json"
        if not path.exists():
            return None
        try:
            return read_json(path)
        except ArtifactError:
            return None

    def keep(self, kind: str, key: str, value: object) -> None:
        """Keep a small JSON value under ``kind``."""
        write_json(self.root / kind / f"{key}.json", value)

    def fetch_file(self, kind: str, name: str, target: Path) -> bool:
        """Copy a kept ONNX file, and its external data, to ``target``; False if there is none."""
        source = self.root / kind / name
        if not source.is_file():
            return False
        try:
            copy_model(source, target)
        except BackendError:  # damaged: it counts as not there
            return False
        return True

    def keep_file(self, kind: str, name: str, source: Path) -> None:
        """Keep a copy of an ONNX file, and of its external data, under ``kind``."""
        copy_model(source, self.root / kind / name)

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
