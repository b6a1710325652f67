"""Memory that a file takes while it runs: the peak of the resident set, in a process of its own.

A process that has trained keeps memory that it no longer needs, and a file that runs in it seems
to take none. So one new process loads the runtime, and forks for each file: what the fork's
resident set grows by, at its highest, is the file's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import PathLike

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["running_memory"]

_RUNS = 3
"""Calls of the file: the first plans the memory, the others show that it stays."""
_PATIENCE = 60.0
"""Seconds per file, and for the start of the process."""


def running_memory(
    paths: Mapping[str, PathLike],
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    inputs: Sequence[NDArray[Any]] | None = None,
) -> dict[str, int | None]:
    """Peak memory of loading and running each file, without the runtime itself.

    Args:
        paths: name → ONNX file.
        backend: a name in :data:`slimkit.runtime.sessions.BACKENDS`.
        threads: threads within one operator.
        batch: images per call, of random numbers.
        inputs: what to feed instead, in the order of the files' inputs.

    Returns:
        Name → bytes; None where it cannot be measured (the system has no ``fork`` or no
        ``/proc``, or the file does not run).
    """
    nothing: dict[str, int | None] = dict.fromkeys(paths)
    if not hasattr(os, "fork") or _resident("VmHWM") is None:
        return nothing
    with tempfile.TemporaryDirectory() as folder:
        job: dict[str, Any] = {
            "path": sys.path,
            "files": {name: str(Path(path).resolve()) for name, path in paths.items()},
            "backend": backend,
            "threads": threads,
            "batch": batch,
            "tiny": _tiny_file(Path(folder) / "tiny.onnx"),
            "inputs": None,
        }
        if inputs is not None:
            import numpy as np

            job["inputs"] = str(Path(folder) / "inputs.npz")
            np.savez(job["inputs"], *inputs)
        start = "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; "
        start += "from slimkit.measure.memory import answer; answer(job)"
        try:
            done = subprocess.run(
                [sys.executable, "-c", start],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=_PATIENCE * (1 + len(paths)),
                check=True,
            )
            found = json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return nothing
    return {name: found.get(name) for name in paths}


def answer(job: Mapping[str, Any]) -> None:
    """Measure all files of a job and print what was found: the other process's side."""
    import slimkit.measure.latency
    import slimkit.runtime.sessions  # noqa: F401

    for module in ("onnxruntime", "openvino"):
        if job["backend"] == module:
            __import__(module)
    found = {name: _in_fork(path, job) for name, path in job["files"].items()}
    sys.stdout.write(json.dumps(found) + "\n")


def _in_fork(path: str, job: Mapping[str, Any]) -> int | None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            os.write(writing, str(_taken(path, job)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text) if text.isdigit() else None


def _taken(path: str, job: Mapping[str, Any]) -> int:
    """Bytes that the resident set of this process grows by, at its highest."""
    import numpy as np

    from slimkit.measure.latency import random_feeds
    from slimkit.runtime.sessions import open_session

    _warmed(job)
    before = _resident("VmRSS") or 0
    session = open_session(path, backend=job["backend"], threads=job["threads"])
    if job["inputs"] is None:
        feeds = random_feeds(session, job["batch"])
    else:
        with np.load(job["inputs"]) as held:
            feeds = [held[name] for name in held.files]
    call = session.prepare(feeds)
    for _ in range(_RUNS):
        call()
    return max(0, (_resident("VmHWM") or 0) - before)


def _warmed(job: Mapping[str, Any]) -> None:
    """Run a file of one operator: the runtime's own code and tables are no file's memory."""
    import numpy as np

    from slimkit.runtime.sessions import open_session

    tiny = open_session(job["tiny"], backend=job["backend"], threads=job["threads"])
    tiny.run([np.zeros((1, 3, 8, 8), np.float32)])
    with contextlib.suppress(OSError):  # the highest so far is forgotten
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _tiny_file(path: Path) -> str:
    """A convolution of three channels, written as ONNX."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.zeros((3, 3, 3, 3), np.float32), "weight")
    node = helper.make_node("Conv", ["image", "weight"], ["output"], pads=[1, 1, 1, 1])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8])
        for name in ("image", "output")
    ]
    graph = helper.make_graph([node], "tiny", ends[:1], ends[1:], [weight])
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
    return str(path)


def _resident(key: str) -> int | None:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at its highest), as Linux says."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    return None
