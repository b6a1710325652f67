"""The table that ``slimkit run`` ends with: the page's figures, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimkit.report import figures
from slimkit.report.gains import lost_effort
from slimkit.report.reading import Report, load_report

if TYPE_CHECKING:
    from rich.table import Table

    from slimkit.artifact import PathLike

__all__ = ["summary_table"]

_STYLES = {"better": "green", "worse": "red"}


def summary_table(report: Mapping[str, Any] | PathLike) -> Table:
    """A row per variant: score, parameters, MACs, file, latency, each with its change.

    Args:
        report: the contents of a ``report.json``, its path, or the folder of a run.

    Returns:
        A table to print with rich; below it the verdict, how sure the score is, what to deploy,
        and what is to be doubted.

    Raises:
        ArtifactError: it is no report.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    read = load_report(report)
    caption = "\n".join(escape(line) for line in _lines(read))
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("variant")
    titles = [title for title in figures.columns(read) if title != "made in"]
    for title in titles:
        short = title.removesuffix(", median").replace("parameters", "params")
        table.add_column(escape(short), justify="right")
    for variant in read.variants:
        cells = figures.row(read, variant)["cells"][: len(titles)]
        table.add_row(escape(variant.name), *(_cell(cell) for cell in cells))
    return table


def _cell(cell: Mapping[str, str]) -> str:
    from rich.markup import escape

    if not cell["change"]:
        return escape(cell["text"])
    style = _STYLES.get(cell["kind"], "dim")
    return f"{escape(cell['text'])}\n[{style}]{escape(cell['change'])}[/{style}]"


def _lines(report: Report) -> list[str]:
    """What is said below the table."""
    lines = [report.verdict()]
    lines += [f"{report.metric_label}: {text}" for text in figures.sure(report, report.final)]
    chosen = figures.deployment(report)
    if chosen:
        lines.append(f"deploy {chosen['name'] or 'nothing yet'}: {chosen['why']}")
    lines += lost_effort(report)
    if report.unreliable:
        lines.append(f"* {report.unreliable}")
    return lines
