"""Knowledge under faults: killed teachers and students, bad networks, hostile messages.

::

    python -m benchmarks.knowledge_faults
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

import slimkit as sk
from benchmarks.knowledge_hostile import HOSTILE, Target, good_question
from benchmarks.knowledge_transport import ReadyTeacher
from benchmarks.tables import ROOT, markdown, write_page
from benchmarks.tcp_proxy import Proxy
from slimkit.distill import KD
from slimkit.distill.knowledge import (
    Knowledge,
    KnowledgeDistiller,
    NetworkTeacher,
    Patience,
    Trust,
    dump,
    issue_token,
    serve,
)
from slimkit.errors import DataError
from slimkit.tasks.data import DataSettings, ImageSplits, load_data
from slimkit.tasks.data.samples import training_samples
from slimkit.train import TrainSettings, fit

SECRET = b"the secret of the benchmark"
PATIENCE = Patience(answer=8.0, lost=120.0)
SEED = 0


def data() -> ImageSplits:
    """Digits of 16×16 pixels, cropped at random."""
    settings = {"source": "digits", "image_size": 16, "batch_size": 32, "augment": {"crop": 2}}
    return load_data(DataSettings.model_validate(settings))


def network(seed: int) -> torch.nn.Module:
    """A ResNet-20 with these first weights."""
    torch.manual_seed(seed)
    return sk.build_model("slimkit:resnet20", num_classes=10, in_channels=1)


def new_teacher(batch_size: int) -> NetworkTeacher:
    """A teacher over the training images, always the same."""
    samples = training_samples(data(), seed=SEED)
    return NetworkTeacher(network(1), samples, batch_size=batch_size, precision="fp32")


def teach(port: int, batch_size: int) -> None:
    """The process of a teacher, until it is killed."""
    with serve(new_teacher(batch_size), port=port, secret=SECRET) as server:
        print(server.address, flush=True)
        server.wait()


def learn(places: Sequence[str], epochs: int, folder: Path) -> None:
    """The process of a student: trains, and writes the hash of what it used."""
    splits, student = data(), network(2)
    trust = Trust(token=issue_token(SECRET, 3600))
    with (
        Knowledge(places, trust=trust, patience=PATIENCE) as knowledge,
        KnowledgeDistiller(student, knowledge, [KD()], splits.train, audit=True) as distiller,
    ):
        settings = TrainSettings(epochs=epochs, lr=0.05, precision="fp32")
        fit(
            student, splits.train, loss_fn=F.cross_entropy, settings=settings,
            losses=[distiller], checkpoint=folder / "run.safetensors", seed=SEED, progress=False,
        )  # fmt: skip
        (folder / "digest.json").write_text(json.dumps(distiller.digest))


def process(*arguments: object) -> subprocess.Popen[str]:
    """This module again, as a teacher or a student."""
    command = [sys.executable, "-m", "benchmarks.knowledge_faults", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Teaching:
    """A teacher's process at a fixed port, which can be killed and started again."""

    def __init__(self, batch_size: int) -> None:
        self.port, self.batch_size = free_port(), batch_size
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        """Start, and wait until it serves."""
        started = process("--role", "teacher", "--port", self.port, "--batch", self.batch_size)
        assert started.stdout is not None
        started.stdout.readline()
        return started

    def kill(self) -> None:
        """Kill -9, and start the next one."""
        self.process.kill()
        self.process.wait()
        self.process = self.start()

    def end(self) -> None:
        """Kill for good."""
        self.process.kill()
        self.process.wait()


@contextmanager
def teaching(batch_size: int) -> Iterator[Teaching]:
    """A teacher's process."""
    teacher = Teaching(batch_size)
    try:
        yield teacher
    finally:
        teacher.end()


def student_run(
    places: Sequence[str],
    epochs: int,
    disturb: Callable[[Callable[[], bool]], int] | None = None,
    kills: int = 0,
) -> tuple[str, float, int]:
    """A student from its first step to its last.

    Args:
        places: of its teachers.
        epochs: to train.
        disturb: does its worst while the function that it is given says that the student
            lives, and returns how often it did.
        kills: so many times the student is killed and started again.

    Returns:
        The hash of what was used, seconds, and disturbances.
    """
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--role", "student", "--epochs", epochs, "--folder", folder, *places]
        started = time.monotonic()
        student, events = process(*arguments), 0
        if disturb is not None:
            events = disturb(lambda: student.poll() is None)
        for _ in range(kills):
            while not (folder / "run.safetensors").exists():
                time.sleep(0.05)
            time.sleep(rng.uniform(4, 9))  # it needs some seconds to get going again
            if student.poll() is None:
                student.kill()
                student.wait()
                student, events = process(*arguments), events + 1
        if student.wait() != 0:
            return "the student failed", time.monotonic() - started, events
        digest = str(json.loads((folder / "digest.json").read_text()))
        return digest, time.monotonic() - started, events


def faults(epochs: int, kills: int) -> list[list[object]]:
    """Rows of fault, how often, seconds, and whether the hash is that of the quiet run."""
    rng = random.Random(0)
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as name, teaching(48) as teacher:
        dump(new_teacher(64), Path(name) / "k", passes=2)
        offline = f"file:{Path(name) / 'k'}"
        direct = [f"grpc://127.0.0.1:{teacher.port}", offline]
        quiet, seconds, _ = student_run(direct, epochs)
        rows.append(["none", 0, f"{seconds:.0f}", quiet[:12]])

        def kill_teacher(alive: Callable[[], bool]) -> int:
            done = 0
            while done < kills and alive():
                time.sleep(rng.uniform(0.2, 2.5))
                if alive():
                    teacher.kill()
                    done += 1
            return done

        def disturb_network(alive: Callable[[], bool]) -> int:
            done = 0
            time.sleep(6)
            while alive() and done < 6:
                if done % 2:
                    proxy.reset()
                else:
                    proxy.stall(5)
                done += 1
                time.sleep(rng.uniform(5.5, 8))
            return done

        def run(fault: str, places: list[str], **how: object) -> None:
            digest, seconds, events = student_run(places, epochs, **how)  # type: ignore[arg-type]
            same = "equal" if digest == quiet else f"**differs** {digest[:20]}"
            rows.append([fault, events, f"{seconds:.0f}", same])
            print(rows[-1], flush=True)

        run("teacher killed (-9), started again", direct, disturb=kill_teacher)
        with Proxy("127.0.0.1", teacher.port) as proxy:
            through = [f"grpc://127.0.0.1:{proxy.port}", offline]
            run("network silent for 5 s, or reset", through, disturb=disturb_network)
        run("student killed (-9), resumed", direct, kills=3)
    return rows


def matching(epochs: int) -> tuple[float, int, int]:
    """Two online teachers and one in files, each with its own batch size.

    Returns:
        Per cent of (sample, epoch) that got its right knowledge, those that got it twice, and
        their number.
    """
    splits = data()
    loader = splits.train
    teachers = [new_teacher(size) for size in (19, 128, 50)]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        dump(teachers[2], name, passes=epochs, shard_rows=300)
        servers = [stack.enter_context(serve(teacher)) for teacher in teachers[:2]]
        places = [*(server.address for server in servers), f"file:{name}"]
        knowledge = stack.enter_context(Knowledge(places, merge="sum"))
        right, twice, total = 0, 0, 0
        loader.fix_changes(SEED, epochs)
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            seen: Counter[int] = Counter()
            batches = [ids.numpy() for ids in loader.epoch_ids(epoch)]
            for (ids, answers), (images, _) in zip(
                knowledge.stream(batches, epoch), loader, strict=True
            ):
                with torch.no_grad():
                    expected = 3 * network_one(images)
                close = torch.isclose(answers["logits"], expected, atol=0.05, rtol=0.02).all(1)
                right += int(close.sum())
                total += len(ids)
                seen.update(ids.tolist())
            twice += sum(count - 1 for count in seen.values())
        return 100 * right / total, twice, total


def network_one(images: torch.Tensor) -> torch.Tensor:
    """What the teachers' network itself says."""
    if "model" not in _CACHE:
        _CACHE["model"] = network(1).eval()
    return torch.as_tensor(_CACHE["model"](images))


_CACHE: dict[str, torch.nn.Module] = {}


class NumberedTeacher(ReadyTeacher):
    """Knows samples 0 … N - 1, in four passes."""

    def __init__(self) -> None:
        super().__init__(1000, 64)
        self.schema = self.schema.model_copy(update={"passes": 4})

    def answer(self, ids: NDArray[np.int64], *rest: Any) -> pa.RecordBatch:
        """The same for every sample that there is."""
        if ids.min() < 0 or ids.max() >= self.schema.samples:
            raise DataError("there is no such sample", where="ask")
        return super().answer(ids, *rest)


def hostile(messages: int) -> list[list[object]]:
    """Rows of kind, messages, accepted; the server must live through all of them."""
    sent: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    kinds = list(HOSTILE)
    rng = random.Random(0)
    server = process("--role", "target")
    assert server.stdout is not None
    port = int(server.stdout.readline())
    try:
        target = Target.at(port, SECRET, NumberedTeacher().schema)
        good = sum(good_question(target, rng) for _ in range(100))
        for number in range(messages):
            kind = kinds[number % len(kinds)]
            sent[kind] += 1
            accepted[kind] += HOSTILE[kind](target, rng)
        good += sum(good_question(target, rng) for _ in range(100))
        alive = server.poll() is None
    finally:
        server.kill()
        server.wait()
    rows: list[list[object]] = [[kind, f"{sent[kind]:,}", accepted[kind]] for kind in kinds]
    rows.append(["**all**", f"{messages:,}", f"**{sum(accepted.values())}**"])
    rows.append(["good questions before and after, same process", 200, good if alive else "dead"])
    return rows


def be_target() -> None:
    """The process that is sent hostile messages."""
    with serve(NumberedTeacher(), secret=SECRET) as server:
        print(server.port, flush=True)
        server.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--messages", type=int, default=10_010)
    parser.add_argument("--quick", action="store_true", help="a quick look; writes no page")
    for name, kind in (("role", str), ("port", int), ("batch", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("places", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.role == "teacher":
        return teach(options.port, options.batch)
    if options.role == "student":
        return learn(options.places, options.epochs, options.folder)
    if options.role == "target":
        return be_target()
    if options.quick:
        options.epochs, options.kills, options.messages = 12, 2, 440
    right, twice, total = matching(3)
    matched = markdown(
        ["samples × epochs", "matched", "used twice"], [[f"{total:,}", f"{right:.2f} %", twice]]
    )
    messages = markdown(["message", "sent", "accepted"], hostile(options.messages))
    print(matched, messages, sep="\n\n", flush=True)
    rows = faults(options.epochs, options.kills)
    runs = markdown(["fault", "times", "seconds", "hash of what was used"], rows)
    print(runs, flush=True)
    if options.quick:
        return None
    write_page(
        "knowledge_faults",
        "Knowledge under faults",
        "python -m benchmarks.knowledge_faults",
        [
            "## Samples matched over three teachers",
            "Two online teachers (batches of 19 and 128) and one in files, merged by sum, against "
            "three times what the network itself says about the student's own images, 3 epochs.",
            matched,
            "## Faults",
            f"A ResNet-20 student, {options.epochs} epochs of digits in batches of 32, one online "
            "teacher and one in files, each in a process of its own, one thread each. The hash is "
            "over (sample, knowledge) in the order of use.",
            runs,
            "## Hostile messages",
            "Generated; the teacher runs in a process of its own and asks for tokens.",
            messages,
        ],
    )
    return None


if __name__ == "__main__":
    main()
