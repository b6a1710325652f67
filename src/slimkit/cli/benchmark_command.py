"""``slimkit benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["benchmark_command"]


def benchmark_command(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODEL.onnx…", help="ONNX files.", show_default=False)
    ],
    backend: Annotated[str, typer.Option(help="See: slimkit list backends.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads within an operator.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Size of another open dimension: height=320."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time per model.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure latency; several files are measured in turns, so that their ratios hold."""
    import json

    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from slimkit.cli.console import errors, output
    from slimkit.measure.latency import benchmark_interleaved

    timings = benchmark_interleaved(
        {str(path): path for path in models},
        backend=backend,
        threads=threads,
        batch=batch,
        sizes=_sizes(size or []),
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


def _sizes(given: list[str]) -> dict[str, int]:
    from slimkit.errors import InputError

    sizes = {}
    for entry in given:
        name, equals, number = entry.partition("=")
        if not equals or not number.isdecimal():
            raise InputError(f"expected NAME=N, got {entry!r}", where="--size")
        sizes[name] = int(number)
    return sizes
