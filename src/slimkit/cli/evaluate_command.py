"""``slimkit evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli.options import Checkpoint, ModelArguments, TaskName

if TYPE_CHECKING:
    from slimkit.tasks import Loader, Splits, Task

__all__ = ["evaluate_command"]

SPLITS = {"train": "calibration", "val": "validation", "validation": "validation", "test": "test"}
"""What ``--split`` may say → the loader; training samples are taken as they are."""


def evaluate_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="A model such as slimkit:resnet20, or an ONNX file.",
            show_default=False,
        ),
    ],
    data: Annotated[str, typer.Option("--data", metavar="SOURCE", help="Where samples come from.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    task: TaskName = None,
    checkpoint: Checkpoint = None,
    arg: ModelArguments = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, max=4096, help="Height and width.", show_default="the data's"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per call.", show_default="the task's")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What runs a file; see: slimkit list backends.")
    ] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads within an operator.")] = 1,
) -> None:
    """Measure how good a model or a file is, a line per metric.

    Example: slimkit evaluate slimkit:resnet56 --checkpoint resnet56.safetensors --data
    parquet:cifar10 --split test
    """
    from slimkit.cli.models import load_task

    kind, splits = load_task(task, data, image_size=image_size, eval_batch_size=batch_size)
    loader = _loader(splits, split)
    if model.endswith(".onnx"):
        run = _file(kind, Path(model), backend, threads)
    else:
        run = _network(kind, splits, model, arg, checkpoint)
    scores = kind.evaluate(run, loader)
    labels = {metric.name: metric for metric in kind.metrics}
    for name in [n for n in labels if n in scores]:
        typer.echo(f"{labels[name].label} {scores[name]:.{labels[name].digits}f}")


def _loader(splits: Splits, split: str) -> Loader:
    """The loader of a split.

    Raises:
        InputError: there is none of that name, or the data have none.
    """
    from slimkit.errors import InputError, nearest

    if split not in SPLITS:
        raise InputError(
            f"there is no split {split!r}", where="--split", hint=nearest(split, SPLITS)
        )
    loader: Loader | None = splits.named.get(split) or getattr(splits, SPLITS[split])
    if loader is None:
        raise InputError("the data have no validation split", where="--split", hint="--split test")
    return loader


def _file(task: Task, path: Path, backend: str, threads: int) -> Any:
    from slimkit.runtime import open_session
    from slimkit.tasks.running import session_run

    session = session_run(open_session(path, backend=backend, threads=threads))
    return lambda inputs: task.complete(session(task.prepare(inputs)), inputs)


def _network(
    task: Task, splits: Splits, name: str, arg: list[str] | None, checkpoint: str | None
) -> Any:
    from slimkit.cli.console import note
    from slimkit.cli.models import parse_arguments, with_weights
    from slimkit.models import build_model
    from slimkit.models.building import takes_argument

    arguments = parse_arguments(arg)
    for argument, value in task.model_arguments(splits).items():
        if not arguments.get("weights") and takes_argument(name, argument):
            arguments.setdefault(argument, value)
    network = with_weights(build_model(name, **arguments).eval(), checkpoint)
    if checkpoint is None and not arg:
        note("its weights are random: no --checkpoint was given")
    task.check_head(network, splits)
    return network
