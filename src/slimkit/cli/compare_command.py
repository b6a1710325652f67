"""``slimkit compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare_command"]


def compare_command(
    a: Annotated[Path, typer.Argument(help="Output folder or report.json.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show two reports side by side: what was set differently, and what came of it."""
    from slimkit.cli.console import output
    from slimkit.report import compare

    comparison = compare(a, b)
    if markdown:
        typer.echo(comparison.markdown(), nl=False)
    else:
        output.print(comparison)
