"""Running an ONNX file: one small interface over every runtime.

A backend is one entry of :data:`BACKENDS`. ``onnxruntime`` comes with Slimkit; ``openvino``
is an extra. All run on the CPU with a fixed number of threads, so that times compare.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import ArtifactError, BackendError, InputError, MissingDependencyError, nearest
from slimkit.registry import Registry
from slimkit.runtime.onnx_files import data_file, load_onnx, model_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendStatus",
    "Session",
    "TensorSpec",
    "available_backends",
    "onnxruntime_options",
    "open_session",
]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of an input or output.

    Attributes:
        name: as in the file.
        shape: one entry per dimension; None where any size goes.
        dtype: numpy's name of the type, such as ``float32``.
        axes: names of the open dimensions, such as ``batch``; None where the size is fixed or
            the dimension has no name.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    axes: tuple[str | None, ...] = ()


class Session(Protocol):
    """A loaded model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        """All outputs, in the order of ``output_names``.

        Args:
            inputs: arrays by input name, or in the order of ``input_names``.

        Raises:
            InputError: names, count, shapes or types do not fit the model.
            BackendError: the runtime fails on them.
        """
        ...

    def prepare(self, inputs: Mapping[str, Array] | Sequence[Array]) -> Callable[[], object]:
        """A function that runs on these inputs each time it is called, for timing.

        All checks and conversions happen here, once; errors as in :meth:`run`.
        """
        ...


class BackendStatus(NamedTuple):
    """``version`` when the backend works, else None and the ``reason``."""

    version: str | None
    reason: str


@dataclass(frozen=True)
class Backend:
    """One runtime.

    Attributes:
        distribution: the installed package that provides it.
        install: the line that installs it.
        open: ``open(path, threads, optimized_path) -> Session``.
    """

    distribution: str
    install: str
    open: Callable[[Path, int, Path | None], Session]

    def status(self) -> BackendStatus:
        """Installed version, or why it cannot be used."""
        try:
            return BackendStatus(importlib.metadata.version(self.distribution), "installed")
        except importlib.metadata.PackageNotFoundError:
            return BackendStatus(None, f"not installed: {self.install}")


BACKENDS: Registry[Backend] = Registry(
    "backend", fits=lambda thing: hasattr(thing, "status") and hasattr(thing, "open")
)
"""Name → runtime."""


@door
def open_session(
    path: PathLike,
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    optimized_path: PathLike | None = None,
) -> Session:
    """Load an ONNX file for running on the CPU.

    Args:
        path: the file.
        backend: a name in :data:`BACKENDS`.
        threads: threads within one operator, ≥ 1; operators run one after the other.
        optimized_path: where the backend writes the graph that it really runs
            (``onnxruntime`` only).

    Raises:
        UnknownNameError: no such backend.
        MissingDependencyError: the backend is not installed; the hint says how to.
        ArtifactError: there is no such file.
        BackendError: the file is damaged, or holds what the backend cannot run.
        InputError: ``threads`` is not a positive integer.
    """
    entry = BACKENDS.get(backend, where="backend")
    if threads < 1:
        raise InputError(f"expected an integer ≥ 1, got {threads!r}", where="threads")
    source = Path(path)
    if not source.is_file():
        raise ArtifactError("there is no such file", where=str(source))
    if entry.status().version is None:
        raise MissingDependencyError(
            f"the backend {backend!r} needs {entry.distribution}, which is not installed",
            where="backend",
            hint=entry.install,
        )
    optimized = None if optimized_path is None else Path(optimized_path)
    try:
        return entry.open(source, threads, optimized)
    except (BackendError, InputError):
        raise
    except Exception as error:  # every runtime has exception types of its own
        for file in model_files(source)[1:]:
            if not file.is_file():
                raise ArtifactError(
                    f"its data {file.name} is missing", where=str(source)
                ) from error
        raise BackendError(
            f"{backend} cannot load it: {_last_words(error)}", where=str(source)
        ) from error


def available_backends() -> dict[str, BackendStatus]:
    """Every known backend with its version, or why it cannot be used."""
    return {name: BACKENDS.get(name).status() for name in BACKENDS}


def _last_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[-300:]


def _ordered(
    inputs: Mapping[str, Array] | Sequence[Array], specs: Sequence[TensorSpec]
) -> list[Array]:
    """Arrays in the order of ``specs``, checked against them."""
    names = [spec.name for spec in specs]
    if isinstance(inputs, Mapping):
        for name in inputs:
            if name not in names:
                raise InputError(f"the model has no input {name!r}", hint=nearest(name, names))
        if len(inputs) < len(names):
            missing = [name for name in names if name not in inputs]
            raise InputError(f"inputs are missing: {', '.join(missing)}")
        arrays = [np.asarray(inputs[name]) for name in names]
    else:
        arrays = [np.asarray(array) for array in inputs]
        if len(arrays) != len(names):
            raise InputError(
                f"the model takes {len(names)} inputs ({', '.join(names)}), got {len(arrays)}"
            )
    for spec, array in zip(specs, arrays, strict=True):
        fits = len(array.shape) == len(spec.shape) and all(
            wanted in (None, size) for size, wanted in zip(array.shape, spec.shape, strict=True)
        )
        if not fits or str(array.dtype) != spec.dtype:
            shape = tuple("any" if size is None else size for size in spec.shape)
            raise InputError(
                f"expected {spec.dtype} of shape {shape}, got {array.dtype} of shape {array.shape}",
                where=spec.name,
            )
    return arrays


_EXTERNAL = "session.optimized_model_external_initializers_"
_FROM_BYTES = ("min_size_in_bytes", "1024")
_ORT_TYPES = {"float": "float32", "double": "float64"}  # the others have numpy's names


def onnxruntime_options(threads: int) -> Any:
    """ONNX Runtime's ``SessionOptions`` under which everything here runs and is timed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    return options


class _OnnxRuntimeSession:
    """Sequential execution, one pool of ``threads``, all graph optimizations."""

    def __init__(self, path: Path, threads: int, optimized_path: Path | None) -> None:
        import onnxruntime

        options = onnxruntime_options(threads)
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
            if data_file(path).exists():  # too much for one file here, so there too
                for key, value in (("file_name", data_file(optimized_path).name), _FROM_BYTES):
                    options.add_session_config_entry(f"{_EXTERNAL}{key}", value)
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = tuple(self._spec(item) for item in self._session.get_inputs())
        self.outputs = tuple(self._spec(item) for item in self._session.get_outputs())
        self.input_names = tuple(spec.name for spec in self.inputs)
        self.output_names = tuple(spec.name for spec in self.outputs)

    def _spec(self, item: Any) -> TensorSpec:
        kind = item.type.removeprefix("tensor(").removesuffix(")")
        shape = tuple(size if isinstance(size, int) else None for size in item.shape)
        axes = tuple(size if isinstance(size, str) and size else None for size in item.shape)
        return TensorSpec(item.name, shape, _ORT_TYPES.get(kind, kind), axes)

    def run(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        try:
            return [np.asarray(array) for array in self._session.run(None, self._feeds(inputs))]
        except InputError:
            raise
        except Exception as error:
            raise BackendError(f"onnxruntime stopped: {_last_words(error)}") from error

    def prepare(self, inputs: Mapping[str, Array] | Sequence[Array]) -> Callable[[], object]:
        self.run(inputs)
        names, feeds, session = list(self.output_names), self._feeds(inputs), self._session
        return lambda: session.run(names, feeds)

    def _feeds(self, inputs: Mapping[str, Array] | Sequence[Array]) -> dict[str, Array]:
        return dict(zip(self.input_names, _ordered(inputs, self.inputs), strict=True))


class _OpenVinoSession:
    """One stream of ``threads``; fp32 stays fp32 (OpenVINO would use bf16 where the CPU can).

    What is prepared for timing is compiled for the shapes of its inputs, where the file leaves
    dimensions open: looking for these in every call takes time.
    """

    def __init__(self, path: Path, threads: int, optimized_path: Path | None) -> None:
        import openvino

        if optimized_path is not None:
            raise InputError("only onnxruntime writes its graph", where="optimized_path")
        self._core = openvino.Core()
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._read = self._core.read_model(str(path))
        self._model = self._compiled(self._read)
        self._request = self._model.create_infer_request()
        self.inputs = tuple(self._spec(port) for port in self._model.inputs)
        if any(None in spec.shape for spec in self.inputs):  # OpenVINO forgets their names
            axes = _axis_names(path)
            self.inputs = tuple(replace(s, axes=axes.get(s.name, ())) for s in self.inputs)
        self.outputs = tuple(self._spec(port) for port in self._model.outputs)
        self.input_names = tuple(spec.name for spec in self.inputs)
        self.output_names = tuple(spec.name for spec in self.outputs)

    def _compiled(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._settings)

    def _fixed_to(self, arrays: Sequence[Array]) -> Any:
        model = self._read.clone()
        ports = zip(model.inputs, arrays, strict=True)
        try:
            model.reshape({port: list(array.shape) for port, array in ports})
            return self._compiled(model)
        except Exception as error:
            raise BackendError(f"openvino stopped: {_last_words(error)}") from error

    @staticmethod
    def _spec(port: Any) -> TensorSpec:
        shape = tuple(d.get_length() if d.is_static else None for d in port.get_partial_shape())
        names = sorted(port.get_names()) or [port.get_node().get_friendly_name()]
        return TensorSpec(names[0], shape, str(np.dtype(port.get_element_type().to_dtype())))

    def run(self, inputs: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
        arrays = _ordered(inputs, self.inputs)
        try:
            results = self._request.infer(arrays, share_inputs=True)
        except Exception as error:
            raise BackendError(f"openvino stopped: {_last_words(error)}") from error
        return [np.array(results[port]) for port in self._model.outputs]

    def prepare(self, inputs: Mapping[str, Array] | Sequence[Array]) -> Callable[[], object]:
        self.run(inputs)
        arrays, request = _ordered(inputs, self.inputs), self._request
        if any(None in spec.shape for spec in self.inputs):
            request = self._fixed_to(arrays).create_infer_request()
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)


def _axis_names(path: Path) -> dict[str, tuple[str | None, ...]]:
    """Input of the file → names of its open dimensions."""
    return {
        value.name: tuple(dim.dim_param or None for dim in value.type.tensor_type.shape.dim)
        for value in load_onnx(path).graph.input
    }


BACKENDS.register("onnxruntime")(
    Backend("onnxruntime", "pip install onnxruntime", _OnnxRuntimeSession)
)
BACKENDS.register("openvino")(
    Backend("openvino", 'pip install "slimkit[openvino]"', _OpenVinoSession)
)
