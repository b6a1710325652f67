"""What a training step costs with a teacher beside it, in another process, or in files.

::

    python -m benchmarks.distill_overhead
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.distill import KD, Distiller
from slimkit.distill.knowledge import Knowledge, KnowledgeDistiller, NetworkTeacher, dump, serve
from slimkit.losses import kd
from slimkit.tasks.data import DataSettings, ImageSplits, synthetic_data
from slimkit.tasks.data.samples import training_samples
from slimkit.train import StepContext, TrainSettings, fit

CLASSES = 100
BATCH = 64


def data(batches: int) -> ImageSplits:
    """Random images of 32×32 pixels, the same in every process."""
    settings = {"image_size": 32, "channels": 3, "batch_size": BATCH, "augment": {"crop": 4}}
    return synthetic_data(DataSettings.model_validate(settings), CLASSES, batches=batches)


def network(name: str) -> nn.Module:
    """A network with the same weights in every process."""
    torch.manual_seed(0)
    return sk.build_model(f"slimkit:{name}", num_classes=CLASSES)


def new_teacher(name: str, batches: int) -> NetworkTeacher:
    """The teacher, asked in batches of its own size."""
    samples = training_samples(data(batches))
    return NetworkTeacher(network(name), samples, batch_size=128, precision="fp32")


def teach(name: str, batches: int, pipe: Connection) -> None:
    """The teacher's process, with one thread, until the pipe is closed."""
    torch.set_num_threads(1)
    with serve(new_teacher(name, batches)) as server:
        pipe.send(server.address)
        with contextlib.suppress(EOFError):
            pipe.recv()


def epoch_seconds(student: nn.Module, splits: ImageSplits, losses: list[Any]) -> float:
    """One epoch of training; what is measured is the loop, not its set-up."""
    settings = TrainSettings(epochs=1, lr=0.01, schedule="constant", precision="fp32")
    history = fit(
        student, splits.train, loss_fn=F.cross_entropy, settings=settings, losses=losses,
        progress=False,
    )  # fmt: skip
    return float(history.epochs[0]["seconds"])


def measure(student_name: str, teacher_name: str, batches: int, repeats: int) -> dict[str, float]:
    """Medians of interleaved epochs, in milliseconds per step."""
    splits, student = data(batches), network(student_name)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=teach, args=(teacher_name, batches, theirs))
    process.start()
    theirs.close()
    beside = network(teacher_name)
    with tempfile.TemporaryDirectory() as folder:
        dump(new_teacher(teacher_name, batches), folder, passes=1)
        if not pipe.poll(120):
            raise RuntimeError("the teacher's process did not start")
        address = pipe.recv()

        def plain() -> float:
            return epoch_seconds(student, splits, [])

        def by_hand() -> float:
            teacher = network(teacher_name).eval().to(memory_format=torch.channels_last)

            def loss(context: StepContext) -> Tensor:
                with torch.no_grad():
                    scores = teacher(context.inputs)
                return kd(context.outputs, scores)

            return epoch_seconds(student, splits, [loss])

        def in_process() -> float:
            with Distiller(student, beside, [KD()], precision="fp32") as distiller:
                distiller.loss(torch.zeros(2, 3, 32, 32), _warm(student))
                return epoch_seconds(student, splits, [distiller])

        def from_place(place: str) -> float:
            with (
                Knowledge([place]) as knowledge,
                KnowledgeDistiller(student, knowledge, [KD()], splits.train) as distiller,
            ):
                return epoch_seconds(student, splits, [distiller])

        ways: dict[str, Callable[[], float]] = {
            "plain": plain,
            "by hand": by_hand,
            "in process": in_process,
            "online": lambda: from_place(address),
            "files": lambda: from_place(f"file:{folder}"),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, run in ways.items():
                seconds = run()
                if repeat:  # the first round warms everything up
                    times[way].append(1000 * seconds / batches)
    pipe.close()
    process.join()
    return {way: statistics.median(found) for way, found in times.items()}


def _warm(student: nn.Module) -> Tensor:
    """Outputs for two images: the in-process teacher is prepared before the clock runs."""
    return torch.as_tensor(student(torch.zeros(2, 3, 32, 32))).detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=30, help="steps per epoch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs per way")
    parser.add_argument("--quick", action="store_true", help="a quick look; writes no page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    batches, repeats = (10, 2) if options.quick else (options.batches, options.repeats)
    rows = []
    for student, teacher in (("resnet20", "resnet20"), ("resnet20", "resnet56")):
        found = measure(student, teacher, batches, repeats)
        rows.append(
            [
                f"{student} from {teacher}",
                *(f"{found[way]:.1f}" for way in found),
                f"{found['in process'] / found['by hand']:.2f}×",
                f"{found['online'] / found['in process']:.2f}×",
                f"{found['files'] / found['plain']:.2f}×",
            ]
        )
    table = markdown(
        ["", "plain, ms", "by hand, ms", "in process, ms", "online, ms", "files, ms",
         "in process / by hand", "online / in process", "files / plain"],
        rows,
    )  # fmt: skip
    if options.quick:
        print(table)
        return
    page = write_page(
        "distill_overhead",
        "What a step costs with a teacher anywhere",
        "python -m benchmarks.distill_overhead",
        [
            table,
            f"Milliseconds per training step on batches of {BATCH} images of 32×32 pixels, "
            f"{CLASSES} classes, float32, median of {repeats} interleaved epochs of {batches} "
            "steps. Every process has one thread. *By hand*: both forwards and the loss called "
            "directly, one backward. *In process*: a `Distiller`, teacher and student in one "
            "process. *Online*: the teacher in a process of its own, over loopback, asked ahead. "
            "*Files*: what it had written before. The loss is cross-entropy, with KD added in all "
            "but the first column.",
        ],
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
