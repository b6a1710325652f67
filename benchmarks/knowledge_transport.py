"""Knowledge over loopback, beside a bare Arrow Flight stream of the same record batches.

::

    python -m benchmarks.knowledge_transport
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pyarrow import flight

from benchmarks.tables import markdown, write_page
from slimkit.distill.knowledge import KeySpec, KnowledgeSchema, OnlineTeacher, Question, serve
from slimkit.distill.knowledge.format.encoding import encode

CLASSES = 1000
READY = 60.0


class ReadyTeacher:
    """Has its answers at hand: what is left is the transport."""

    def __init__(self, samples: int, batch_size: int) -> None:
        key = KeySpec(name="logits", shape=(CLASSES,))
        self.schema = KnowledgeSchema(keys=(key,), fingerprint="transport", samples=samples)
        self.batch_size, self.parallel = batch_size, 1
        logits = torch.randn(batch_size, CLASSES, generator=torch.Generator().manual_seed(0))
        self.logits = encode(self.schema, np.arange(batch_size), {"logits": logits}).column(1)

    def answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, Any] | None = None,
    ) -> pa.RecordBatch:
        """The same logits for every batch, under the numbers that were asked for."""
        columns = [pa.array(ids), self.logits[: len(ids)]]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema.arrow(names))


class BareServer(flight.FlightServerBase):  # type: ignore[misc]
    """Flight as it comes: one stream of the same record batches."""

    def __init__(self, teacher: ReadyTeacher, samples: int) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.teacher, self.samples = teacher, samples

    def do_get(self, context: Any, ticket: Any) -> Any:
        """All samples."""
        size, names = self.teacher.batch_size, self.teacher.schema.names
        parts = (
            self.teacher.answer(np.arange(start, min(start + size, self.samples)), 0, names)
            for start in range(0, self.samples, size)
        )
        return flight.GeneratorStream(self.teacher.schema.arrow(names), parts)


def teach(samples: int, batch_size: int, pipe: Connection) -> None:
    """The teacher's process: both servers, until the pipe is closed."""
    teacher = ReadyTeacher(samples, batch_size)
    with serve(teacher) as ours:
        bare = BareServer(teacher, samples)
        pipe.send((ours.address, f"grpc://127.0.0.1:{bare.port}"))
        with contextlib.suppress(EOFError):
            pipe.recv()
        bare.shutdown()


def bare_seconds(address: str, samples: int) -> float:
    """Read everything, look at nothing."""
    client = flight.FlightClient(address)
    started = time.perf_counter()
    reader = client.do_get(flight.Ticket(b""))
    count = 0
    try:
        while True:
            count += len(reader.read_chunk().data)
    except StopIteration:
        pass
    seconds = time.perf_counter() - started
    assert count == samples
    client.close()
    return seconds


def our_seconds(address: str, samples: int, student_batch: int) -> float:
    """Read everything as the student's tensors: in its order and sizes, checked."""
    teacher = OnlineTeacher(address)
    order = np.random.default_rng(0).permutation(samples).astype(np.int64)
    batches = [order[start : start + student_batch] for start in range(0, samples, student_batch)]
    started = time.perf_counter()
    count = 0
    for answer in teacher.stream((Question(ids) for ids in batches), 0, ["logits"]):
        count += len(answer["logits"])
    seconds = time.perf_counter() - started
    assert count == samples
    teacher.close()
    return seconds


def measure(samples: int, batch_size: int, student: int, repeats: int) -> tuple[float, float]:
    """Medians of interleaved runs: seconds of the bare stream, and ours."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=teach, args=(samples, batch_size, theirs))
    process.start()
    theirs.close()
    if not pipe.poll(READY):
        raise RuntimeError("the teacher's process did not start")
    ours, bare = pipe.recv()
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for repeat in range(repeats + 1):
        for way in ("bare", "ours"):
            seconds = (
                bare_seconds(bare, samples)
                if way == "bare"
                else our_seconds(ours, samples, student)
            )
            if repeat:  # the first run warms both up
                times[way].append(seconds)
    pipe.close()
    process.join()
    return statistics.median(times["bare"]), statistics.median(times["ours"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=131_072)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a quick look; writes no page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    samples, repeats = (16_384, 2) if options.quick else (options.samples, options.repeats)
    rows = []
    for batch_size, student in ((128, 128), (512, 128), (2048, 128), (8192, 128), (2048, 2048)):
        bare, ours = measure(samples, batch_size, student, repeats)
        size = samples * CLASSES * 2 / 1e6
        rows.append(
            [f"{batch_size} → {student}", f"{size / bare:,.0f}", f"{size / ours:,.0f}",
             f"{100 * bare / ours:.0f} %"]
        )  # fmt: skip
    table = markdown(
        ["teacher's batch → student's", "bare Flight, MB/s", "ours, MB/s", "ours / bare"], rows
    )
    if options.quick:
        print(table)
        return
    page = write_page(
        "knowledge_transport",
        "Knowledge over loopback",
        "python -m benchmarks.knowledge_transport",
        [
            table,
            f"{samples:,} samples of float16 logits for {CLASSES} classes, one teacher process, "
            f"one student process, median of {repeats} interleaved runs. *Bare Flight* is one "
            "`do_get` that streams the same record batches, unread. *Ours* asks by sample number "
            "in the student's shuffled order, compares every number, checks that values are "
            "finite, and hands out tensors of the student's batch size.",
        ],
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
