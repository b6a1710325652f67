"""Safe reading and writing of bytes: atomic files and folders, JSON, safetensors, hashes.

Nothing here leaves a half-written file behind: content goes to a temporary neighbour first
and is moved into place when it is complete. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PathLike",
    "atomic_directory",
    "atomic_file",
    "atomic_files",
    "content_hash",
    "read_json",
    "read_tensors",
    "tensors_hash",
    "write_json",
    "write_tensors",
    "write_text",
]

PathLike = str | os.PathLike[str]


def _failed(action: str, path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"cannot {action}: {error.strerror or error}", where=str(path))


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``.

    Raises:
        ArtifactError: the folder is not writable or the disk is full; ``path`` is untouched.
    """
    final = Path(path)
    with _temporary(final, _new_file) as temporary:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        temporary.replace(final)


@contextlib.contextmanager
def atomic_files(path: PathLike, companions: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder; on success its files go beside ``path``, and ``path`` comes last.

    At no moment is there a ``path`` beside companions of another one: where companions change,
    the old ``path`` is removed first.

    Args:
        path: the file that names the others; written into the folder under its own name.
        companions: names of the files that go with it. Those that are beside ``path`` and were
            not written are removed.

    Raises:
        ArtifactError: the folder is not writable or the disk is full; ``path`` is untouched.
    """
    final = Path(path)
    with _temporary(final, _new_directory) as folder:
        yield folder
        if any((final.parent / name).exists() for name in companions):
            final.unlink(missing_ok=True)
        for name in companions:
            if (folder / name).exists():
                os.chmod(folder / name, 0o666 & ~_umask())
                (folder / name).replace(final.parent / name)
            else:
                (final.parent / name).unlink(missing_ok=True)
        os.chmod(folder / final.name, 0o666 & ~_umask())
        (folder / final.name).replace(final)


@contextlib.contextmanager
def atomic_directory(path: PathLike) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it replaces ``path`` as a whole.

    Raises:
        ArtifactError: the parent is not writable or the disk is full; ``path`` is untouched.
    """
    final = Path(path)
    with _temporary(final, _new_directory) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if final.exists():  # a folder in use cannot be replaced: it is moved out of the way
            outgoing = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
            final.replace(outgoing / final.name)
            temporary.replace(final)
            shutil.rmtree(outgoing, ignore_errors=True)
        else:
            temporary.replace(final)


@contextlib.contextmanager
def _temporary(final: Path, create: Callable[[Path], Path]) -> Iterator[Path]:
    """A temporary neighbour of ``final`` that is gone afterwards unless it was moved."""
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = create(final)
        yield temporary
    except ArtifactError:
        raise
    except OSError as error:
        raise _failed("write", final, error) from error
    finally:
        if temporary is not None and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary is not None:
            temporary.unlink(missing_ok=True)


def _new_file(final: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.stem}.", suffix=final.suffix)
    os.close(handle)
    return Path(name)


def _new_directory(final: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))


def _umask() -> int:
    """The umask of the process, read without changing it: other threads write files, too."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("Umask:"))
        return int(line.partition(":")[2], 8)
    current = os.umask(0o077)  # there is no other way to read it elsewhere
    os.umask(current)
    return current


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8 ``text`` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: object) -> None:
    """Write ``value`` as indented JSON, atomically. NaN is refused: it is not JSON."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"value cannot be written as JSON: {error}", where=str(path)) from error
    write_text(path, text + "\n")


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: missing, unreadable, or not JSON (with line and column).
    """
    source = Path(path)
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise _failed("read", source, error) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"not a JSON file: {error}", where=str(source)) from error


def write_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, atomically; shared storage is written twice."""
    from safetensors.torch import save_file

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(plain, str(temporary), metadata=dict(metadata) if metadata else None)
        except Exception as error:  # safetensors wraps I/O errors in its own type
            raise ArtifactError(f"cannot write tensors: {error}", where=str(path)) from error


def read_tensors(path: PathLike) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        ArtifactError: missing, cut off, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = Path(path)
    try:
        return load_file(str(source))
    except FileNotFoundError as error:
        raise ArtifactError("there is no such file", where=str(source)) from error
    except OSError as error:
        raise _failed("read", source, error) from error
    except SafetensorError as error:
        raise ArtifactError(
            f"not a complete safetensors file: {error}", where=str(source)
        ) from error


def content_hash(value: object) -> str:
    """SHA-256 (hex) of a JSON-able value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes, independent of order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
