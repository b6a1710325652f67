"""The table that ``slimkit run`` ends with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimkit.report import words
from slimkit.report.reading import load_report

if TYPE_CHECKING:
    from rich.table import Table

    from slimkit.artifact import PathLike

__all__ = ["summary_table"]


def _with(text: str, change: str) -> str:
    return f"{text}\n[dim]{change}[/dim]" if change else text


def summary_table(report: Mapping[str, Any] | PathLike) -> Table:
    """A row per variant: score, parameters, MACs, file, latency, each with its change.

    Args:
        report: the contents of a ``report.json``, its path, or the folder of a run.

    Returns:
        A table to print with rich; its caption is the verdict.

    Raises:
        ArtifactError: it is no report.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    read = load_report(report)
    base = read.baseline
    table = Table(box=box.SIMPLE_HEAD, caption=escape(read.verdict()), caption_justify="left")
    table.add_column("variant")
    scored = read.score(base) is not None
    titles = [read.head.title] if scored else []
    titles += ["params", "MACs", "file", *(item.label for item in read.latencies)]
    for title in titles:
        table.add_column(escape(title), justify="right")
    for variant in read.variants:
        first = variant is base
        cells = []
        if scored:
            change = "" if first else read.head.change(read.score_change(variant))
            cells.append(_with(read.head.plain(read.score(variant)), change))
        for key, write in (("params", words.count), ("macs", words.count), ("bytes", words.size)):
            now, before = variant.cost.get(key), base.cost.get(key)
            cells.append(_with(write(now), "" if first else words.change(now, before)))
        for example in read.latencies:
            now = variant.median_ms(example.setting)
            before = base.median_ms(example.setting)
            change = "" if first else words.change(now, before)
            cells.append(_with(words.milliseconds(now), change))
        table.add_row(escape(variant.name), *cells)
    return table
