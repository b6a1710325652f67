"""Safe reading and writing of bytes: atomic files and folders, JSON, safetensors, hashes.

Nothing here leaves a half-written file behind: content goes to a temporary neighbour first
and is moved into place when it is complete. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import escape as glob_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from slimkit.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "UNFINISHED",
    "PathLike",
    "atomic_directory",
    "atomic_file",
    "atomic_files",
    "content_hash",
    "file_hash",
    "parse_json",
    "read_bytes",
    "read_directory",
    "read_json",
    "read_tensors",
    "tensors_hash",
    "write_json",
    "write_tensors",
    "write_text",
]

PathLike = str | os.PathLike[str]
Contents = TypeVar("Contents")

MOST_JSON_BYTES = 2**28
"""Of a JSON file, 256 MiB; the largest plan of a network of 10⁹ weights takes a tenth of it."""
_LARGEST_INTEGER = 2**63
"""Integers lie below it; beyond, neither torch nor Arrow nor a JSON reader elsewhere has them."""
_INTEGER_DIGITS = 20
"""Of an integer of 64 bits, with its sign."""
UNFINISHED = ".part-"
"""Within the name of a file that is being written; what is left of one that was killed has it."""
_ATTEMPTS = 1000
"""How often a folder is read or replaced again because another process replaced it meanwhile."""


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
        _sync(temporary)
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
        for name in (*companions, final.name):
            if (folder / name).exists():
                _sync(folder / name)
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

    The two folders change places in one step where the file system can do that (Linux, macOS).
    Elsewhere there is a moment without ``path``; who is killed then leaves the old one beside it,
    where :func:`read_directory` finds it. Of several who write at once, the last one wins.

    Args:
        path: of the folder; a link stays a link.

    Raises:
        ArtifactError: the parent is not writable, the disk is full, or ``path`` is a file or the
            current folder; ``path`` is untouched.
    """
    final = Path(os.path.realpath(path))
    if os.path.lexists(final) and not final.is_dir():
        raise ArtifactError("this is no folder", where=str(path))
    if final in (current := Path(os.path.realpath(os.curdir)), *current.parents):
        raise ArtifactError(
            "the current folder would be replaced with all that is in it",
            where=str(path),
            hint="name a folder of its own, such as model/",
        )
    with _temporary(final, _new_directory) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _put_in_place(temporary, final)
        _sync(final.parent)


def read_directory(path: PathLike, read: Callable[[Path], Contents]) -> Contents:
    """What ``read`` makes of a folder written by :func:`atomic_directory`, of one version of it.

    Reading starts anew when the folder was replaced meanwhile.

    Args:
        path: of the folder. If it is missing because a writer was killed, it is put back.
        read: gets the folder, may open several of its files, and changes nothing.

    Raises:
        ArtifactError: what ``read`` raises, of a folder that nobody replaces.
    """
    final = Path(path)
    for _ in range(_ATTEMPTS):
        _put_back(final)
        before = _version(final)
        try:
            found = read(final)
        except ArtifactError:
            if before == _version(final):
                raise
        else:
            if before == _version(final):
                return found
    raise ArtifactError("it is replaced faster than it can be read", where=str(path))


def _version(folder: Path) -> tuple[int, ...] | None:
    """What tells one version of a folder from the next: its inode, and when it was filled."""
    try:
        found = folder.stat()
    except (OSError, ValueError):  # missing, or no name for a file
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _put_in_place(temporary: Path, final: Path) -> None:
    """Let ``temporary`` replace ``final``; what was there lies at ``temporary`` afterwards.

    Others may do the same at any moment: then it is tried again.

    Raises:
        OSError: neither way is possible; ``final`` is as before.
    """
    for _ in range(_ATTEMPTS):
        try:
            if not final.exists():
                temporary.rename(final)
            elif not _exchanged(temporary, final):
                _replace_in_two_steps(temporary, final)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}:
                raise
            if not temporary.exists():
                raise
        else:
            return
    raise ArtifactError("others replace it all the time", where=str(final))


def _replace_in_two_steps(temporary: Path, final: Path) -> None:
    """Move ``final`` out of the way, then ``temporary`` in; see :func:`_put_back`."""
    outgoing = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
    try:
        final.replace(outgoing / final.name)
        temporary.replace(final)
    except OSError:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(OSError):  # it never left, or another one is there now
                (outgoing / final.name).rename(final)
            if final.exists():
                shutil.rmtree(outgoing, ignore_errors=True)
                break
        raise
    shutil.rmtree(outgoing, ignore_errors=True)


def _put_back(final: Path) -> None:
    """Undo the first of two steps if the second was never done: the writer was killed."""
    if os.path.lexists(final):
        return
    with contextlib.suppress(OSError, ValueError):  # no such parent, or no name for a file
        for outgoing in final.parent.glob(f".{glob_escape(final.name)}.old.*"):
            with contextlib.suppress(OSError):  # another reader or the writer was faster
                (outgoing / final.name).rename(final)
                outgoing.rmdir()
                return


@functools.cache
def _system_exchange() -> Callable[[bytes, bytes], int] | None:
    """The system's call that swaps two names in one step; None if there is none."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda one, other: int(swap(one, other, ctypes.c_uint(2)))  # RENAME_SWAP
        swap = library.renameat2
    except (OSError, AttributeError, TypeError):
        return None
    here = ctypes.c_int(-100)  # AT_FDCWD: names are relative to the current folder
    return lambda one, other: int(swap(here, one, here, other, ctypes.c_uint(2)))  # RENAME_EXCHANGE


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two folders in one step, unless the system or the file system cannot do that."""
    exchange = _system_exchange()
    if exchange is None:
        return False
    if exchange(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOENT, errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS}:
        raise OSError(code, os.strerror(code))
    return False


_NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES}
"""What a file system answers that has nothing to sync, or cannot sync folders."""


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk: they outlive a power cut."""
    if path.is_symlink() or (os.name == "nt" and path.is_dir()):
        return
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


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
    prefix = f".{final.stem}{UNFINISHED}"
    handle, name = tempfile.mkstemp(dir=final.parent, prefix=prefix, suffix=final.suffix)
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
    """Read a JSON file; see :func:`parse_json` for what is accepted.

    Raises:
        ArtifactError: missing, unreadable, too large, or not JSON (with line and column).
    """
    source = _regular(path)
    try:
        size = source.stat().st_size
        if size > MOST_JSON_BYTES:
            raise ArtifactError(
                f"{size:,} bytes, and at most {MOST_JSON_BYTES:,} of JSON are read",
                where=str(source),
            )
        return parse_json(source.read_text(encoding="utf-8"), str(source))
    except OSError as error:
        raise _failed("read", source, error) from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"not a JSON file: {error}", where=str(source)) from error


def parse_json(text: str | bytes, where: str) -> Any:
    """What a JSON text from outside says: no NaN or infinity, integers of 64 bits at most.

    Args:
        text: UTF-8 where it is bytes.
        where: the file or the peer, for the error.

    Raises:
        ArtifactError: it is not JSON, nested too deeply, or holds a number beyond these limits.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_fraction
        )
    except RecursionError as error:
        raise ArtifactError("not a JSON file: nested too deeply", where=where) from error
    except ValueError as error:
        raise ArtifactError(f"not a JSON file: {error}", where=where) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) <= _INTEGER_DIGITS else _LARGEST_INTEGER
    if not -_LARGEST_INTEGER <= value < _LARGEST_INTEGER:
        raise ValueError(f"the integer {digits[:20]}… has more than 64 bits")
    return value


def _fraction(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def read_bytes(path: PathLike) -> bytes:
    """The bytes of a small file, such as a key or a certificate.

    Raises:
        ArtifactError: missing, unreadable, or no regular file.
    """
    source = _regular(path)
    try:
        return source.read_bytes()
    except OSError as error:
        raise _failed("read", source, error) from error


def _regular(path: PathLike) -> Path:
    """A path that does not wait for a writer when it is opened, as a pipe would."""
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError:
        return source  # opening it says why
    except ValueError as error:
        raise ArtifactError(f"no name of a file: {error}", where=repr(str(path))) from error
    if not stat.S_ISREG(mode):
        raise ArtifactError("cannot read: this is no regular file", where=str(source))
    return source


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

    source = _regular(path)
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


def file_hash(path: PathLike) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        ArtifactError: missing or unreadable.
    """
    source = _regular(path)
    try:
        with source.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _failed("read", source, error) from error


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes, independent of order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():  # an empty one may have a stride that view() refuses
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
