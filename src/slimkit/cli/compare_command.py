"""``slimkit compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare_command"]


def compare_command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN…", help="Output folders or report.json files.", show_default=False
        ),
    ],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show reports side by side: what was set differently, and what came of it.

    Example: slimkit compare runs/first runs/second runs/third
    """
    from slimkit.cli.console import output
    from slimkit.report import compare

    comparison = compare(*runs)
    if markdown:
        typer.echo(comparison.markdown(), nl=False)
    else:
        output.print(comparison)
