"""Latency per layer, by ONNX Runtime's profiler, and the layers that gain nothing.

MACs are no milliseconds: kernels pad channels to the width of the vector unit, thin layers wait
for memory, and what has no MACs takes time too. :func:`unrewarded` says so when a smaller network
is hardly faster, and names the layers.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import PathLike
from slimkit.errors import SlimkitError
from slimkit.measure.latency import random_feeds
from slimkit.measure.tables import human_count
from slimkit.runtime.fusion import origin
from slimkit.runtime.onnx_files import load_onnx
from slimkit.runtime.sessions import onnxruntime_options, open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, NodeProto

__all__ = ["LayerTime", "layer_times", "least_gained", "unrewarded"]

_WARMUP = 2
"""Runs before those that count."""
_INTEGER = {"QLinearConv": "Conv", "QGemm": "Gemm", "QLinearMatMul": "MatMul"}
_WORTH_A_WORD = 0.2
"""Part of the MACs that must have gone before anybody expects to see it in the milliseconds."""
_FAIR_SHARE = 1 / 3
"""Part of the MACs' relative fall that the milliseconds should fall by at least: what is bound by
memory and what has no MACs takes the rest in networks that gain as expected."""


@dataclass(frozen=True)
class LayerTime:
    """What one layer of a file takes inside the runtime.

    Attributes:
        name: of the node in the file, which is the module's path.
        type: ONNX operator.
        ms: per inference; what the runtime adds around it (reordering) counts where it is named.
        macs: multiply-accumulates per inference; 0 for what multiplies no weights.
        shape: in words, such as ``"3×3, 24→144"``.
        size: of its output, ``(height, width)`` for images; empty if unknown.
    """

    name: str
    type: str
    ms: float
    macs: int
    shape: str
    size: tuple[int, ...]


def layer_times(
    path: PathLike,
    *,
    threads: int = 1,
    batch: int = 1,
    inputs: Sequence[NDArray[Any]] | None = None,
    seconds: float = 0.5,
) -> dict[str, LayerTime]:
    """Time every layer of a file inside ONNX Runtime, by its own profiler.

    The profiler costs some microseconds per operator: compare layers with each other, not
    their sum with a latency.

    Args:
        path: an ONNX file.
        threads: threads within one operator.
        batch: images per call, for a file with an open batch.
        inputs: arrays to feed, in order; random numbers by default.
        seconds: time to spend, at least five runs.

    Returns:
        Name → time, in the order in which the layers run.

    Raises:
        ArtifactError, BackendError, InputError: as :func:`slimkit.runtime.open_session`.
    """
    session = open_session(path, threads=threads)
    feeds = list(random_feeds(session, batch) if inputs is None else inputs)
    session.run(feeds)  # checks them
    events, runs = _profiled(Path(path), threads, feeds, seconds)
    return _by_layer(events, runs, load_onnx(path).graph)


def _profiled(
    path: Path, threads: int, feeds: Sequence[NDArray[Any]], seconds: float
) -> tuple[list[dict[str, Any]], int]:
    """The profiler's events of all operators, and how many runs they are from."""
    import onnxruntime

    options = onnxruntime_options(threads)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        fed = dict(zip([item.name for item in session.get_inputs()], feeds, strict=True))
        runs, end = 0, time.perf_counter() + seconds
        while runs < _WARMUP + 5 or (time.perf_counter() < end and runs < 200):
            session.run(None, fed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node"], runs


def _by_layer(
    events: Sequence[Mapping[str, Any]], runs: int, graph: GraphProto
) -> dict[str, LayerTime]:
    """Events summed up by the layer of the file that they come from."""
    durations: dict[str, list[float]] = {}
    example: dict[str, Mapping[str, Any]] = {}
    for event in events:
        name = str(event["name"]).removesuffix("_kernel_time")
        durations.setdefault(name, []).append(float(event["dur"]) / 1e3)
        example[name] = event["args"]
    known = {node.name: node for node in graph.node}
    producers = {output: node for node in graph.node for output in node.output}
    weights = _weights(graph)
    found: dict[str, LayerTime] = {}
    for name, times in durations.items():
        per_run = len(times) / runs  # more than one inside a loop
        ms = statistics.median(times[round(_WARMUP * per_run) :]) * per_run
        source = _source(name, str(example[name]["op_name"]), known, producers)
        layer = _layer(source, name, example[name], weights, ms)
        before = found.get(layer.name)
        if before is None or (not before.macs and layer.macs):
            found[layer.name] = _plus(layer, before.ms if before else 0.0)
        else:
            found[layer.name] = _plus(before, ms)
    return found


def _plus(layer: LayerTime, ms: float) -> LayerTime:
    return LayerTime(layer.name, layer.type, layer.ms + ms, layer.macs, layer.shape, layer.size)


def _source(
    name: str, kind: str, known: Mapping[str, NodeProto], producers: Mapping[str, NodeProto]
) -> NodeProto | None:
    """The node of the file that a node of the running graph was made from."""
    from onnx import helper

    if name in known:
        return known[name]
    running = helper.make_node(_INTEGER.get(kind, kind), [], [name], name=name)
    return known.get(origin(running, producers))


def _weights(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    """Node name → shape of the constant that it multiplies with, behind a dequantization too."""
    constants = {item.name: tuple(item.dims) for item in graph.initializer}
    behind = {
        node.output[0]: constants[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    shapes = {**constants, **behind}
    return {
        node.name: shapes[node.input[1]]
        for node in graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and len(node.input) > 1
        and node.input[1] in shapes
    }


def _layer(
    source: NodeProto | None,
    name: str,
    event: Mapping[str, Any],
    weights: Mapping[str, tuple[int, ...]],
    ms: float,
) -> LayerTime:
    outputs, ins = _shapes(event, "output_type_shape"), _shapes(event, "input_type_shape")
    out = outputs[0] if outputs else ()
    size = out[2:] if len(out) > 2 else ()
    if source is None:
        return LayerTime(name, str(event["op_name"]), ms, 0, "", size)
    weight = weights.get(source.name, ())
    kind = source.op_type
    if not weight or not out:
        return LayerTime(source.name or name, kind, ms, 0, "", size)
    if kind == "ConvTranspose":
        places = ins[0][:1] + ins[0][2:] if ins else ()
    elif kind == "Conv":  # not the channels, which the runtime pads
        places = out[:1] + out[2:]
    else:
        places = out[:-1]
    macs = math.prod(weight) * math.prod(places)
    return LayerTime(source.name, kind, ms, macs, _shape_text(source, weight), size)


def _shapes(event: Mapping[str, Any], key: str) -> list[tuple[int, ...]]:
    return [tuple(dims) for item in event.get(key) or () for dims in item.values()]


def _shape_text(node: NodeProto, weight: tuple[int, ...]) -> str:
    """``"3×3, 24→144"``, with the number of groups if there are several."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type not in ("Conv", "ConvTranspose"):
        flipped = "transB" in attributes and attributes["transB"].i
        first, last = (weight[1], weight[0]) if flipped else (weight[0], weight[-1])
        return f"{first}→{last}"
    groups = attributes["group"].i if "group" in attributes else 1
    first, last = weight[1] * groups, weight[0]
    if node.op_type == "ConvTranspose":
        first, last = weight[0], weight[1] * groups
    kernel = "×".join(str(size) for size in weight[2:])
    return f"{kernel}, {first}→{last}" + (f" in {groups} groups" if groups > 1 else "")


def least_gained(
    before: Mapping[str, LayerTime], after: Mapping[str, LayerTime], count: int = 3
) -> list[str]:
    """The layers that keep most of the time which their fall in MACs should have saved.

    Args:
        before: :func:`layer_times` of the original.
        after: of the smaller network; layers are compared by name.
        count: at most so many.

    Returns:
        One line per layer: shape, MACs and milliseconds before and after, the worst first.
    """
    macs = sum(layer.macs for layer in before.values())
    overall = sum(layer.macs for layer in after.values()) / macs if macs else 1.0

    def kept(old: LayerTime, new: LayerTime) -> float:
        """Milliseconds above what they would be if they had fallen like the MACs."""
        return new.ms - old.ms * (new.macs / old.macs if old.macs else overall)

    pairs = [(before[name], new) for name, new in after.items() if name in before]
    pairs.sort(key=lambda pair: -kept(*pair))
    return [_line(old, new) for old, new in pairs[:count] if kept(old, new) > 0]


def _line(old: LayerTime, new: LayerTime) -> str:
    shape = old.shape
    if new.shape != old.shape:  # the kernel stays, the channels do not
        shape += f" now {new.shape.removeprefix(old.shape.partition(',')[0] + ', ')}"
    size = f"on {'×'.join(str(n) for n in new.size)}" if new.size else ""
    what = " ".join(part for part in (old.type, shape, size) if part)
    macs = f"{human_count(old.macs)} → {human_count(new.macs)} MACs" if old.macs else "no MACs"
    return f"{old.name} ({what}): {macs}, {old.ms:.3f} → {new.ms:.3f} ms"


def unrewarded(
    files: tuple[PathLike | None, PathLike | None],
    *,
    macs: tuple[float, float],
    ms: tuple[float, float],
    backend: str,
    threads: int = 1,
    batch: int = 1,
    inputs: Sequence[NDArray[Any]] | None = None,
) -> str | None:
    """A warning if MACs fell and milliseconds hardly did, with the layers to blame.

    It is given when at least 20 % of the MACs have gone, and less than a third of that part of
    the time.

    Args:
        files: ONNX files of the original and of the smaller network, None if there is none;
            the layers are timed in ONNX Runtime and named only if ``backend`` is that.
        macs: before and after.
        ms: before and after, measured in turns.
        backend: where.
        threads: with so many threads.
        batch: images per call.
        inputs: as in :func:`layer_times`.

    Returns:
        The warning, or None.
    """
    if not (macs[0] > 0 and ms[0] > 0):
        return None
    fewer, faster = 1 - macs[1] / macs[0], 1 - ms[1] / ms[0]
    if fewer < _WORTH_A_WORD or faster >= _FAIR_SHARE * fewer:
        return None
    time_text = f"fell by {100 * faster:.0f} %" if faster >= 0.005 else "did not"
    text = (
        f"MACs fell by {100 * fewer:.0f} %, milliseconds {time_text} "
        f"({ms[0]:.3g} → {ms[1]:.3g} ms in {backend})"
    )
    lines = _blamed(files, threads, batch, inputs) if backend == "onnxruntime" else []
    return f"{text}; least gained by {'; '.join(lines)}" if lines else text


def _blamed(
    files: tuple[PathLike | None, PathLike | None],
    threads: int,
    batch: int,
    inputs: Sequence[NDArray[Any]] | None,
) -> list[str]:
    before, after = files
    if before is None or after is None:
        return []
    try:
        old, new = (
            layer_times(path, threads=threads, batch=batch, inputs=inputs)
            for path in (before, after)
        )
    except SlimkitError:  # the warning is true without the names, too
        return []
    return least_gained(old, new)
