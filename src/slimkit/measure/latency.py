"""Measured latency: warm-up, a fixed number of threads, median and 90th percentile.

A mean over a shared machine tells about the machine; the median of many runs, and the ratio
of medians taken in turns (:func:`benchmark_interleaved`), tell about the model.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError, nearest
from slimkit.inputs import Batch, ExampleInputs, Inputs, as_inputs
from slimkit.modules import evaluation
from slimkit.outside import first_line
from slimkit.runtime.sessions import Session, TensorSpec, open_session
from slimkit.runtime.structure import named_feeds

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Timing", "benchmark", "benchmark_interleaved", "random_feeds"]

_MIN_RUNS = 5
"""Timed calls at least, however long one takes: fewer have no 90th percentile."""
_TURN_SECONDS = 0.05
"""Seconds of one model's turn in an interleaved round: long against the warm-up of its caches."""
_BUSY_CORES = 0.2
"""Cores that other processes keep busy, from which on a measurement is called disturbed."""


@dataclass(frozen=True)
class Timing:
    """Latency of one model, all times in milliseconds per call (not per image).

    Attributes:
        backend: ``onnxruntime``, ``openvino`` or ``torch``.
        threads: threads within one operator.
        batch: images per call.
        median_ms, p90_ms, min_ms, mean_ms: over ``runs`` calls after warm-up.
        runs: timed calls.
        busy: why the times are not to be trusted, or None: other processes used the same cores.
    """

    backend: str
    threads: int
    batch: int
    median_ms: float
    p90_ms: float
    min_ms: float
    mean_ms: float
    runs: int
    busy: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields, times rounded to 0.1 µs."""
        data = asdict(self)
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in data.items()}

    def __str__(self) -> str:
        text = (
            f"{self.median_ms:.3f} ms median, {self.p90_ms:.3f} ms p90 ({self.runs} runs, "
            f"{self.backend}, {self.threads} thread{'s'[: self.threads > 1]}, batch {self.batch})"
        )
        return f"{text}; {self.busy}" if self.busy else text


@door
def benchmark(
    model: PathLike | nn.Module,
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    inputs: ExampleInputs | Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]] | None = None,
    warmup: int = 5,
    runs: int | None = None,
    seconds: float = 2.0,
) -> Timing:
    """Time a model.

    Args:
        model: an ONNX file, or a module with ``backend="torch"``.
        backend: a name in :data:`slimkit.runtime.sessions.BACKENDS`, or ``torch``.
        threads: threads within one operator, ≥ 1.
        batch: images per call; a file with a fixed batch takes only that.
        sizes: of a file's other open dimensions, by name: ``{"height": 320, "width": 320}``.
        inputs: what to feed; a file gets random numbers by default, a module needs them.
            Then ``batch`` is what they have in dimension 0. Keywords go by name.
        warmup: calls before timing, ≥ 0.
        runs: timed calls; by default as many as fit in ``seconds``, at least 5.
        seconds: time to spend when ``runs`` is not given.

    Raises:
        InputError: wrong arguments, or inputs that do not fit.
        UnknownNameError, MissingDependencyError, BackendError, ArtifactError: as
            :func:`slimkit.runtime.sessions.open_session`.
    """
    timings = benchmark_interleaved(
        {"model": model},
        backend=backend,
        threads=threads,
        batch=batch,
        sizes=sizes,
        inputs=inputs,
        warmup=warmup,
        runs=runs,
        seconds=seconds,
    )
    return timings["model"]


@door
def benchmark_interleaved(
    models: Mapping[str, PathLike | nn.Module],
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    inputs: ExampleInputs | Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]] | None = None,
    warmup: int = 5,
    runs: int | None = None,
    seconds: float = 2.0,
) -> dict[str, Timing]:
    """Time several models in turns (A B C A B C …), so that ratios hold on a drifting machine.

    A turn lasts about 50 ms and its first call is not counted, because the caches hold the
    weights of another model then.

    Args:
        models: name → ONNX file or module.
        backend: as in :func:`benchmark`, the same for all.
        threads: the same.
        batch: the same.
        sizes: the same.
        inputs: the same.
        warmup: calls per model before timing.
        runs: timed calls per model.
        seconds: time per model when ``runs`` is not given.

    Raises:
        The same as :func:`benchmark`.
    """
    _check(models, threads, batch, warmup, runs, seconds)
    batch = batch if inputs is None else _rows(inputs, batch)
    with contextlib.ExitStack() as stack:
        calls = {
            name: _prepare(stack, model, backend, threads, inputs, (batch, sizes or {}))
            for name, model in models.items()
        }
        for call in calls.values():
            for _ in range(warmup):
                call()
        load = _OtherLoad()
        times = _take_turns(calls, runs, seconds)
        busy = load.warning()
    return {name: _timing(values, busy, backend, threads, batch) for name, values in times.items()}


def _check(
    models: Mapping[str, Any],
    threads: int,
    batch: int,
    warmup: int,
    runs: int | None,
    seconds: float,
) -> None:
    for name, value, least in (
        ("threads", threads, 1),
        ("batch", batch, 1),
        ("warmup", warmup, 0),
        ("runs", 1 if runs is None else runs, 1),
    ):
        if value < least:
            raise InputError(f"expected an integer ≥ {least}, got {value!r}", where=name)
    if not seconds > 0:
        raise InputError(f"expected a time above 0, got {seconds!r}", where="seconds")
    if not models:
        raise InputError("there is no model to time", where="models")


def _take_turns(
    calls: Mapping[str, Callable[[], object]], runs: int | None, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every counted call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)

    def unfinished(name: str) -> bool:
        if runs is not None:
            return len(times[name]) < runs
        return spent[name] < seconds or len(times[name]) < _MIN_RUNS

    alone = len(calls) == 1
    waiting = list(calls)
    while waiting:
        for name in waiting:
            call = calls[name]
            if not alone:
                call()
            start = now = time.perf_counter()
            while unfinished(name) and (alone or now - start < _TURN_SECONDS):
                before = time.perf_counter()
                call()
                now = time.perf_counter()
                times[name].append((now - before) * 1e3)
                spent[name] += now - before
        waiting = [name for name in waiting if unfinished(name)]
    return times


def _timing(
    values: list[float], busy: str | None, backend: str, threads: int, batch: int
) -> Timing:
    return Timing(
        backend=backend,
        threads=threads,
        batch=batch,
        median_ms=float(np.median(values)),
        p90_ms=float(np.percentile(values, 90)),
        min_ms=min(values),
        mean_ms=float(np.mean(values)),
        runs=len(values),
        busy=busy,
    )


def _prepare(
    stack: contextlib.ExitStack,
    model: PathLike | nn.Module,
    backend: str,
    threads: int,
    inputs: Any,
    sizes: tuple[int, Mapping[str, int]],
) -> Callable[[], object]:
    """A function that runs the model once."""
    if isinstance(model, nn.Module):
        if backend != "torch":
            raise InputError(
                f"the backend {backend!r} takes an ONNX file, got a {type(model).__name__}",
                where="model",
                hint='export it first, or use backend="torch"',
            )
        if inputs is None:
            raise InputError("a module is timed on given inputs", where="inputs")
        example = as_inputs(inputs)
        stack.enter_context(_torch_inference(model, threads))
        return lambda: example.run(model)
    if backend == "torch":
        raise InputError(
            f"the backend 'torch' takes a module, got {os.fspath(model)!r}", where="model"
        )
    session = open_session(Path(model), backend=backend, threads=threads)
    if inputs is None:
        batch, others = sizes
        return session.prepare(random_feeds(session, batch, others))
    return session.prepare(_as_feeds(inputs, session))


@contextlib.contextmanager
def _torch_inference(model: nn.Module, threads: int) -> Iterator[None]:
    """Evaluation mode, no gradients, ``threads`` threads; all restored afterwards."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluation(model), torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(earlier)


@door
def random_feeds(
    session: Session, batch: int = 1, sizes: Mapping[str, int] | None = None, *, seed: int = 0
) -> list[NDArray[Any]]:
    """Random inputs that fit ``session``: normal floats, zeros and ones for integers.

    Args:
        session: a loaded file.
        batch: size of dimension 0, where it is open and has no other name in ``sizes``.
        sizes: name of an open dimension → its size.
        seed: of the random numbers.

    Raises:
        InputError: the file has another fixed batch, an open dimension without a size, or none
            of a name in ``sizes``.
    """
    generator = np.random.default_rng(seed)
    chosen = dict(sizes or {})
    known = {name for spec in session.inputs for name in spec.axes if name is not None}
    for name, size in chosen.items():
        if name not in known:
            raise InputError(
                f"no dimension of the file is called {name!r}",
                where="sizes",
                hint=nearest(name, known),
            )
        if size < 1:
            raise InputError(f"expected an integer ≥ 1, got {size!r}", where=f"sizes.{name}")
    return [_random_array(spec, batch, chosen, generator) for spec in session.inputs]


def _random_array(
    spec: TensorSpec, batch: int, sizes: Mapping[str, int], generator: np.random.Generator
) -> NDArray[Any]:
    axes = spec.axes or (None,) * len(spec.shape)
    shape, unknown = [], []
    for position, (fixed, name) in enumerate(zip(spec.shape, axes, strict=True)):
        size = sizes.get(name or "", batch if position == 0 else None) if fixed is None else fixed
        if size is None:
            unknown.append(name or f"dimension {position}")
        shape.append(size or 0)
    if spec.shape and spec.shape[0] not in (None, batch):
        raise InputError(
            f"the file takes a batch of {spec.shape[0]} only, not {batch}",
            where=spec.name,
            hint="export with dynamic_batch=True",
        )
    if unknown:
        unknown = list(dict.fromkeys(unknown))
        example = ", ".join(f"{name!r}: …" for name in unknown)
        raise InputError(
            f"its shape {spec.shape} is open in more than the batch: {' and '.join(unknown)}",
            where=spec.name,
            hint=f"give sizes={{{example}}} or inputs=",
        )
    kind = np.dtype(spec.dtype)
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    return generator.integers(0, 2, shape).astype(kind)


def _rows(inputs: Any, default: int) -> int:
    """Examples in the inputs: dimension 0 of the first tensor or array, length of a first list."""
    if isinstance(inputs, Batch):
        inputs = inputs.inputs
    if isinstance(inputs, (Inputs, tuple)):
        arguments = inputs.args if isinstance(inputs, Inputs) else inputs
        if arguments and isinstance(arguments[0], list):
            return len(arguments[0])
    leaves = inputs.tensors() if isinstance(inputs, Inputs) else tree_leaves(inputs)
    return next((int(leaf.shape[0]) for leaf in leaves if getattr(leaf, "ndim", 0)), default)


def _as_feeds(inputs: Any, session: Session) -> Mapping[str, NDArray[Any]] | list[NDArray[Any]]:
    """Arrays by name or position, from arrays or tensors."""
    if isinstance(inputs, Batch):
        inputs = inputs.inputs
    if isinstance(inputs, Mapping):
        if not all(isinstance(value, torch.Tensor) for value in inputs.values()):
            return {name: _as_array(value) for name, value in inputs.items()}
        inputs = Inputs((), dict(inputs))
    if isinstance(inputs, (Inputs, torch.Tensor)):
        inputs = as_inputs(inputs)
    if isinstance(inputs, Inputs):
        return named_feeds(inputs, session.input_names)
    return [_as_array(leaf) for leaf in tree_leaves(inputs)]


def _as_array(leaf: Any) -> NDArray[Any]:
    try:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().cpu().numpy()
        return np.asarray(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"expected arrays, got a {type(leaf).__name__}: {first_line(error)}", where="inputs"
        ) from error


class _OtherLoad:
    """CPU time that other processes take from the cores of this one."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._own = time.process_time()
        self._cores = _own_cores()
        self._all = _busy_seconds(self._cores)

    def warning(self) -> str | None:
        """A sentence when the machine was busy since construction."""
        elapsed = time.perf_counter() - self._start
        now = _busy_seconds(self._cores)
        if self._all is None or now is None or elapsed < 0.1:  # /proc/stat counts in 10 ms
            others = self._from_load_average(elapsed)
        else:
            others = (now - self._all - (time.process_time() - self._own)) / elapsed
        if others < _BUSY_CORES:
            return None
        return f"other processes kept {others:.1f} of these cores busy: times are unreliable"

    def _from_load_average(self, elapsed: float) -> float:
        try:
            load = os.getloadavg()[0]
        except (OSError, AttributeError):
            return 0.0
        own = (time.process_time() - self._own) / max(elapsed, 1e-3)
        cores = os.cpu_count() or 1
        return max(0.0, load - max(own, 1.0)) if load > cores else 0.0


def _own_cores() -> frozenset[str]:
    """The cores that this process may use, as ``/proc/stat`` calls them."""
    if not hasattr(os, "sched_getaffinity"):
        return frozenset()
    return frozenset(f"cpu{number}" for number in os.sched_getaffinity(0))


def _busy_seconds(cores: frozenset[str]) -> float | None:
    """Seconds that ``cores`` have spent working since boot; None if unknown."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    total = 0
    for line in lines:
        name, *fields = line.split()
        if name in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / ticks if total else None
