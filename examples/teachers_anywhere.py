"""One student, three teachers: two in processes of their own, one in files.

python examples/teachers_anywhere.py --epochs 4
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from slimkit.distill import KD
from slimkit.distill.knowledge import Knowledge, KnowledgeDistiller, NetworkTeacher, dump, serve
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import DataSettings, Splits, load_data
from slimkit.tasks.data.samples import training_samples
from slimkit.train import TrainSettings, fit

DATA = DataSettings.model_validate(
    {"source": "digits", "image_size": 8, "batch_size": 32, "augment": {"crop": 1}}
)
PASSES = 2  # differently cropped passes that the files hold; the student's epochs take turns


def network(width: int, seed: int) -> nn.Sequential:
    """Wide ones teach, a narrow one learns."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


def train(
    model: nn.Module, splits: Splits, epochs: int, losses: Sequence[KnowledgeDistiller] = ()
) -> float:
    """Train, and return the accuracy on the validation images."""
    settings = TrainSettings(epochs=epochs, lr=0.05, precision="fp32")
    fit(model, splits.train, loss_fn=F.cross_entropy, settings=settings, losses=losses,
        progress=False)  # fmt: skip
    assert splits.validation is not None
    return ClassificationTask().evaluate(model, splits.validation)["accuracy"]


def trained_teacher(seed: int, epochs: int, batch_size: int) -> NetworkTeacher:
    """A teacher; its batch size is its own business."""
    splits = load_data(DATA)
    model = network(24, seed)
    train(model, splits, epochs)
    return NetworkTeacher(model, training_samples(splits), batch_size=batch_size)


def teach(seed: int, epochs: int, batch_size: int, pipe: Connection) -> None:
    """A teacher's process: says where it serves, and does so until it is told to stop."""
    torch.set_num_threads(1)
    with serve(trained_teacher(seed, epochs, batch_size)) as server:
        pipe.send(server.address)
        pipe.recv()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of every training")
    parser.add_argument("--out", type=Path, default=Path("runs/teachers_anywhere"))
    options = parser.parse_args(arguments)

    # Two teachers in processes of their own. On other machines it would be
    # `slimkit teach serve`, with a secret and TLS.
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for seed, batch_size in ((1, 40), (2, 100)):
        ours, theirs = context.Pipe()
        process = context.Process(target=teach, args=(seed, options.epochs, batch_size, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)

    # The third writes down what it knows, and needs not be there when the student learns.
    dump(trained_teacher(3, options.epochs, 64), options.out / "knowledge", passes=PASSES)

    splits = load_data(DATA)
    alone = train(network(4, seed=0), splits, options.epochs)

    student = network(4, seed=0)
    places = [*(pipe.recv() for pipe in pipes), f"file:{options.out / 'knowledge'}"]
    with Knowledge(places, merge="confidence") as knowledge:
        knowledge.check_data(splits.samples_fingerprint, splits.classes)
        with KnowledgeDistiller(student, knowledge, [KD(temperature=2)], splits.train) as term:
            taught = train(student, splits, options.epochs, [term])
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()

    print(f"student alone {alone:.1f} %, with three teachers {taught:.1f} %")
    return {"alone": alone, "taught": taught}


if __name__ == "__main__":
    main()
