"""``slimkit report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report_command"]


def report_command(
    folder: Annotated[Path, typer.Argument(help="Output folder of a run.", show_default=False)],
) -> None:
    """Print the summary of a finished run and write its report.html again."""
    from slimkit.cli.console import output
    from slimkit.report import summary_table, write_report

    page = write_report(folder)
    output.print(summary_table(folder))
    output.print(str(page), style="bold", markup=False)
