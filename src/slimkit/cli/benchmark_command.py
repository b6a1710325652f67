"""``slimkit benchmark``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli.options import Checkpoint, InputShape, ModelArguments

__all__ = ["benchmark_command"]


def benchmark_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|FILE…",
            help="ONNX files, or models such as torchvision:resnet18, which are exported first.",
            show_default=False,
        ),
    ],
    backend: Annotated[str, typer.Option(help="See: slimkit list backends.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads within an operator.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Size of another open dimension: height=320."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time per model.")] = 2.0,
    input_shape: InputShape = None,
    arg: ModelArguments = None,
    checkpoint: Checkpoint = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure latency; several files are measured in turns, so that their ratios hold.

    Example: slimkit benchmark model.onnx torchvision:resnet18 --threads 1
    """
    import json

    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from slimkit.cli.console import errors, output
    from slimkit.cli.models import parse_sizes
    from slimkit.measure.latency import benchmark_interleaved

    with tempfile.TemporaryDirectory() as folder:
        timings = benchmark_interleaved(
            {name: _file(name, Path(folder), input_shape, arg, checkpoint) for name in models},
            backend=backend,
            threads=threads,
            batch=batch,
            sizes=parse_sizes(size),
            seconds=seconds,
        )
    if as_json:
        typer.echo(json.dumps({name: t.to_json() for name, t in timings.items()}, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("file")
    for heading in ("median ms", "p90 ms", "min ms", "runs", "against the first"):
        table.add_column(heading, justify="right")
    first = next(iter(timings.values())).median_ms
    for name, timing in timings.items():
        table.add_row(
            escape(name),
            f"{timing.median_ms:.3f}",
            f"{timing.p90_ms:.3f}",
            f"{timing.min_ms:.3f}",
            str(timing.runs),
            f"{timing.median_ms / first:.2f}×",
        )
    output.print(table)
    output.print(f"{backend}, threads: {threads}, batch: {batch}")
    for warning in {timing.busy for timing in timings.values() if timing.busy}:
        errors.print(f"warning: {warning}", style="yellow", markup=False)


def _file(
    name: str, folder: Path, shape: str | None, arg: list[str] | None, checkpoint: str | None
) -> Path:
    """An ONNX file: what is named, or a model exported into ``folder``."""
    from slimkit.cli.models import model_and_input
    from slimkit.runtime import export

    if ":" not in name or name.endswith(".onnx") or Path(name).exists():
        return Path(name)
    network, example = model_and_input(name, shape, arg, checkpoint)
    target = folder / f"{len(list(folder.iterdir()))}.onnx"
    export(network, target, example)
    return target
