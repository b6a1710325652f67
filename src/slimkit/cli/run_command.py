"""``slimkit run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["run_command"]


def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Output folder.", show_default="runs/NAME")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, what is cached and the time it takes.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps per stage on synthetic data.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Of PyTorch, in place of the recipe's.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")] = False,
) -> None:
    """Run a recipe: train, compress, export, measure, report.

    What is in the cache is not run again, and an interrupted run continues where it was.
    """
    from slimkit.cli.console import errors, note, output
    from slimkit.cli.narration import Narrator, data_line
    from slimkit.recipe import load_recipe, preview_run, run_recipe

    edits = [*(set_ or ()), *([f"threads={threads}"] if threads is not None else [])]
    loaded = load_recipe(recipe, edits, tell=note)
    folder = out if out is not None else Path("runs") / loaded.name
    if dry_run:
        preview = preview_run(loaded, smoke=smoke)
        output.print(data_line(preview.data), markup=False)
        output.print(preview.table())
        return
    narrator = Narrator(errors, quiet=quiet)
    try:
        run_recipe(loaded, folder, smoke=smoke, progress=not quiet, listener=narrator)
    finally:
        page = folder / "report.json"
        if narrator.finished and page.exists():
            from slimkit.report import summary_table

            output.print(summary_table(page))
            output.print(f"{folder / 'report.html'}", style="bold", markup=False)
