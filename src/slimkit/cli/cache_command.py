"""``slimkit cache list`` and ``slimkit cache clear``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["cache_app"]

cache_app = typer.Typer(help="What finished stages left, for later runs to use.")

Folder = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="The folder.", show_default="$SLIMKIT_CACHE"),
]


@cache_app.command("list")
def list_command(cache: Folder = None) -> None:
    """Show every entry with its size and age, the oldest first.

    Example: slimkit cache list
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from slimkit.cli.console import output
    from slimkit.measure.tables import human_bytes
    from slimkit.recipe.cache import Cache
    from slimkit.report.words import age

    found = Cache(cache)
    entries = found.entries()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("kind", "stage", "key"):
        table.add_column(heading)
    for heading in ("size", "age"):
        table.add_column(heading, justify="right")
    for entry in entries:
        table.add_row(
            escape(entry.kind),
            escape(entry.name),
            escape(entry.key[:12]),
            human_bytes(entry.bytes),
            age(entry.seconds),
        )
    if entries:
        output.print(table)
    total = human_bytes(sum(entry.bytes for entry in entries))
    output.print(f"{found.root}: {len(entries)} entries, {total}", markup=False)


@cache_app.command("clear")
def clear_command(
    cache: Folder = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="DAYS", help="Only what was written so many days ago or earlier."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove entries; a later run makes them again.

    Example: slimkit cache clear --older-than 30
    """
    from slimkit.cli.console import output
    from slimkit.measure.tables import human_bytes
    from slimkit.recipe.cache import Cache

    found = Cache(cache)
    limit = 0.0 if older_than is None else older_than * 86_400
    chosen = [entry for entry in found.entries() if entry.seconds >= limit]
    total = human_bytes(sum(entry.bytes for entry in chosen))
    if not chosen:
        output.print(f"{found.root}: nothing to remove", markup=False)
        return
    question = f"remove {len(chosen)} entries, {total}, from {found.root}?"
    if not yes and not typer.confirm(question):
        raise typer.Abort
    gone = sum(found.remove(entry) for entry in chosen)
    output.print(f"removed {gone} of {len(chosen)} entries, {total}", markup=False)
    if gone < len(chosen):
        output.print("the others are in use by a running recipe", markup=False)
