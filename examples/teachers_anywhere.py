"""One student, three teachers: two in processes of their own or on a Ray cluster, one in files.

python examples/teachers_anywhere.py --epochs 4
python examples/teachers_anywhere.py --epochs 4 --ray
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from slimkit.distill import KD
from slimkit.distill.knowledge import (
    Knowledge,
    KnowledgeDistiller,
    NetworkTeacher,
    TeacherPool,
    dump,
    ray_pool,
    serve,
)
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import DataSettings, ImageSplits, load_data
from slimkit.tasks.data.samples import training_samples
from slimkit.train import TrainSettings, fit

DATA = DataSettings.model_validate(
    {"source": "digits", "image_size": 8, "batch_size": 32, "augment": {"crop": 1}}
)
TEACHERS = ((1, 40), (2, 100))  # seed and batch size of those that are online
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
    model: nn.Module, splits: ImageSplits, epochs: int, losses: Sequence[KnowledgeDistiller] = ()
) -> float:
    """Train, and return the accuracy on the validation images."""
    settings = TrainSettings(epochs=epochs, lr=0.05, precision="fp32")
    fit(model, splits.train, loss_fn=F.cross_entropy, settings=settings, losses=losses,
        progress=False)  # fmt: skip
    assert splits.validation is not None
    return ClassificationTask().evaluate(model, splits.validation)["accuracy"]


def trained(seed: int, epochs: int) -> nn.Sequential:
    """A wide network that has learned from the labels."""
    model = network(24, seed)
    train(model, load_data(DATA), epochs)
    return model


def answering(model: nn.Module, batch_size: int) -> NetworkTeacher:
    """The network as a teacher; its batch size is its own business."""
    return NetworkTeacher(model, training_samples(load_data(DATA)), batch_size=batch_size)


def teach(seed: int, epochs: int, batch_size: int, pipe: Connection) -> None:
    """A teacher's process: says where it serves, and does so until it is told to stop."""
    torch.set_num_threads(1)
    with serve(answering(trained(seed, epochs), batch_size)) as server:
        pipe.send(server.address)
        pipe.recv()


@contextlib.contextmanager
def in_processes(epochs: int) -> Iterator[list[str]]:
    """Addresses of two teachers in processes of their own.

    On other machines it would be ``slimkit teach serve``, with a secret and TLS.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for seed, batch_size in TEACHERS:
        ours, theirs = context.Pipe()
        arguments = (seed, epochs, batch_size, theirs)
        process = context.Process(target=teach, args=arguments, daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    yield [pipe.recv() for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("stop")
        process.join()


@contextlib.contextmanager
def on_ray(epochs: int) -> Iterator[list[TeacherPool]]:
    """The same two teachers on a Ray cluster, which is started here if there is none.

    Each is two actors, which answer about one half of the samples each and are restarted where
    they die. ``insecure`` is for a network of one's own; else give it a secret and TLS files.
    Four small actors may share two cores, so none of them claims a core of its own.
    """
    import ray

    yield [
        ray_pool(
            partial(answering, trained(seed, epochs), batch_size),
            2,
            insecure=True,
            actor_options={"num_cpus": 0},
        )
        for seed, batch_size in TEACHERS
    ]
    ray.shutdown()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of every training")
    parser.add_argument("--out", type=Path, default=Path("runs/teachers_anywhere"))
    parser.add_argument("--ray", action="store_true", help="online teachers are actors of Ray")
    options = parser.parse_args(arguments)

    with (on_ray if options.ray else in_processes)(options.epochs) as online:
        # The third writes down what it knows, and needs not be there when the student learns.
        folder = options.out / "knowledge"
        dump(answering(trained(3, options.epochs), 64), folder, passes=PASSES)

        splits = load_data(DATA)
        alone = train(network(4, seed=0), splits, options.epochs)

        student = network(4, seed=0)
        with Knowledge([*online, f"file:{folder}"], merge="confidence") as knowledge:
            knowledge.check_data(splits.samples_fingerprint, splits.classes)
            with KnowledgeDistiller(student, knowledge, [KD(temperature=2)], splits.train) as term:
                taught = train(student, splits, options.epochs, [term])

    print(f"student alone {alone:.1f} %, with three teachers {taught:.1f} %")
    return {"alone": alone, "taught": taught}


if __name__ == "__main__":
    main()
