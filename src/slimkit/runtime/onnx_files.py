"""ONNX models on disk: one file, or one file and its external data beside it.

A protobuf message holds less than 2 GiB. Where a model takes more, its weights go to
``model.onnx.data`` beside ``model.onnx``, as ONNX's external data; runtimes find them there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from slimkit.artifact import PathLike, atomic_files
from slimkit.errors import ArtifactError, BackendError, ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["copy_model", "data_file", "file_bytes", "load_onnx", "model_files", "write_onnx"]

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes of the largest protobuf message."""
_EXTERNAL_FROM = 1024
"""Bytes of the smallest weight that leaves the file, ONNX's own default: runtimes fold the small
ones, shapes and axes among them, while they read the graph."""


def write_onnx(
    model: ModelProto,
    path: PathLike,
    *,
    check: bool = False,
    accept: Callable[[Path], None] = lambda _: None,
) -> tuple[Path, ...]:
    """Write ``model`` atomically, with external data if it is too large for one file.

    Args:
        model: its weights are moved out of it if they are written to a file of their own.
        path: replaced, together with the data beside it.
        check: let ONNX check operators, types and shapes before anything is replaced.
        accept: gets the complete file at a temporary place; if it raises, nothing is replaced.

    Returns:
        The files: ``path``, and its data if there is some.

    Raises:
        ExportError: the graph is not valid.
        ArtifactError: not writable, or the disk is full.
    """
    import onnx

    final, beside = Path(path), data_file(path)
    content = _serialized(model)
    if content is not None and check:
        with _checking():
            onnx.checker.check_model(model, full_check=True)
    stale = content is not None and beside.exists() and _names(final, beside)
    with atomic_files(final, [beside.name] if content is None or stale else []) as folder:
        target = folder / final.name
        if content is not None:
            target.write_bytes(content)
        else:
            onnx.save_model(
                model,
                str(target),
                save_as_external_data=True,
                all_tensors_to_one_file=True,
                location=beside.name,
                size_threshold=_EXTERNAL_FROM,
            )
            if check:
                with _checking():
                    onnx.checker.check_model(str(target), full_check=True)
        accept(target)
    return (final,) if content is not None else (final, beside)


def load_onnx(path: PathLike, *, weights: bool = False) -> ModelProto:
    """Read an ONNX file.

    Args:
        path: the file.
        weights: read its external data too, if it has some.

    Raises:
        BackendError: it is damaged.
        ArtifactError: there is no such file, or its data is missing.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ArtifactError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:  # protobuf's own type, which has no stubs
        raise BackendError("not an ONNX file", where=str(path)) from error
    if weights:
        for file in _data_files(model, Path(path)):
            if not file.is_file():
                raise ArtifactError(f"its data {file.name} is missing", where=str(path))
        try:
            onnx.load_external_data_for_model(model, str(Path(path).parent))
        except Exception as error:  # ONNX checks sizes and places of the data
            raise BackendError(f"its data does not fit: {error}", where=str(path)) from error
    return model


def data_file(path: PathLike) -> Path:
    """Where the external data of the model at ``path`` is: ``model.onnx.data``."""
    return Path(path).with_name(Path(path).name + ".data")


def model_files(path: PathLike) -> tuple[Path, ...]:
    """The file and the external data that it names, whether that is there or not.

    Raises:
        BackendError: it is damaged.
        ArtifactError: there is no such file.
    """
    source = Path(path)
    return (source, *_data_files(load_onnx(source), source))


def file_bytes(path: PathLike) -> int:
    """Bytes of the model at ``path``, external data included.

    Raises:
        BackendError: it is damaged.
        ArtifactError: a file is missing.
    """
    total = 0
    for file in model_files(path):
        try:
            total += file.stat().st_size
        except OSError as error:
            raise ArtifactError("there is no such file", where=str(file)) from error
    return total


def copy_model(source: PathLike, target: PathLike) -> None:
    """Copy a model and the external data that it names, atomically.

    The data keeps its name, by which the model finds it.

    Raises:
        BackendError: it is damaged.
        ArtifactError: a file is missing, or ``target`` is not writable.
    """
    final = Path(target)
    _, *data = model_files(source)
    with atomic_files(final, [file.name for file in data]) as folder:
        shutil.copyfile(source, folder / final.name)
        for file in data:
            shutil.copyfile(file, folder / file.name)


def _data_files(model: ModelProto, path: Path) -> list[Path]:
    names = {
        entry.value
        for item in model.graph.initializer
        for entry in item.external_data
        if entry.key == "location"
    }
    return [path.parent / name for name in sorted(names)]


def _serialized(model: ModelProto) -> bytes | None:
    """The bytes of one file; None if they are too many."""
    if _weight_bytes(model) >= PROTOBUF_LIMIT:
        return None
    try:
        content = model.SerializeToString(deterministic=True)
    except Exception:  # protobuf's own type, for a message beyond its limit
        return None
    return content if len(content) < PROTOBUF_LIMIT else None


def _weight_bytes(model: ModelProto) -> int:
    return sum(len(item.raw_data) for item in model.graph.initializer)


def _names(path: Path, data: Path) -> bool:
    """Whether the model at ``path`` has its weights in ``data``."""
    try:
        return data in model_files(path)
    except (ArtifactError, BackendError):
        return False


@contextlib.contextmanager
def _checking() -> Iterator[None]:
    import onnx

    try:
        yield
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ExportError(f"the exported graph is not valid: {reason}") from error
