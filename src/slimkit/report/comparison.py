"""Two reports side by side: what was set differently, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimkit.report import words
from slimkit.report.reading import Report, Variant, load_report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slimkit.artifact import PathLike

__all__ = ["Comparison", "compare"]

HEADER = ("variant", "figure", "A", "B", "change")
SETTINGS_HEADER = ("setting", "A", "B")


@dataclass(frozen=True)
class Comparison:
    """What differs between two reports. Print it with rich, or take :meth:`markdown`.

    Attributes:
        rows: (variant, figure, in A, in B, change from A to B), as written in reports.
        settings: (path in the recipe, value in A, value in B) of what was set differently.
        only_a: variants that only A has.
        only_b: variants that only B has.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]
    settings: tuple[tuple[str, str, str], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def _notes(self) -> list[str]:
        return [
            f"only in {name}: {', '.join(variants)}"
            for name, variants in (("A", self.only_a), ("B", self.only_b))
            if variants
        ]

    def markdown(self) -> str:
        """Two Markdown tables: the figures and the settings that differ."""
        parts = [_markdown_table(HEADER, self.rows)] if self.rows else []
        if self.settings:
            parts.append(_markdown_table(SETTINGS_HEADER, self.settings))
        return "\n\n".join([*parts, *self._notes()]) + "\n"

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        parts: list[RenderableType] = []
        for header, rows in ((HEADER, self.rows), (SETTINGS_HEADER, self.settings)):
            if not rows:
                continue
            table = Table(box=box.SIMPLE_HEAD)
            for number, title in enumerate(header):
                right = header is HEADER and number > 1
                table.add_column(title, justify="right" if right else "left", overflow="fold")
            previous = ""
            for row in rows:
                same = header is HEADER and row[0] == previous
                if header is HEADER and previous and not same:
                    table.add_section()
                previous = row[0]
                table.add_row("" if same else escape(row[0]), *(escape(cell) for cell in row[1:]))
            parts.append(table)
        return Group(*parts, *(escape(note) for note in self._notes()))


def _markdown_table(header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def compare(a: Mapping[str, Any] | PathLike, b: Mapping[str, Any] | PathLike) -> Comparison:
    """Compare two reports, variant by variant.

    Args:
        a: the contents of a ``report.json``, its path, or the folder of a run.
        b: the other one.

    Raises:
        ArtifactError: one of them is no report.
    """
    first, second = load_report(a), load_report(b)
    others = {variant.name: variant for variant in second.variants}
    rows: list[tuple[str, str, str, str, str]] = []
    for variant in first.variants:
        if variant.name in others:
            rows.extend(_variant_rows(first, variant, second, others[variant.name]))
    names = {variant.name for variant in first.variants}
    return Comparison(
        rows=tuple(rows),
        settings=tuple(_different_settings(first, second)),
        only_a=tuple(v.name for v in first.variants if v.name not in others),
        only_b=tuple(v.name for v in second.variants if v.name not in names),
    )


def _variant_rows(
    first: Report, one: Variant, second: Report, two: Variant
) -> list[tuple[str, str, str, str, str]]:
    rows: list[tuple[str, str, str, str, str]] = []
    before, after = first.score(one), second.score(two)
    if before is not None and after is not None and first.metric == second.metric:
        head = first.head
        figures = (head.plain(before), head.plain(after), head.change(after - before))
        rows.append((one.name, head.title, *figures))
    for key, title, write in (
        ("params", "params", words.count),
        ("macs", "MACs", words.count),
        ("bytes", "file", words.size),
    ):
        old, new = one.cost.get(key), two.cost.get(key)
        if old is not None and new is not None:
            rows.append((one.name, title, write(old), write(new), words.change(new, old)))
    for item in one.latency:
        new = two.median_ms(item.setting)
        if new is not None:
            old_text, new_text = words.milliseconds(item.median_ms), words.milliseconds(new)
            slower = words.change(new, item.median_ms)
            rows.append((one.name, item.label, old_text, new_text, slower))
    return rows


def _different_settings(first: Report, second: Report) -> list[tuple[str, str, str]]:
    def collect(report: Report) -> dict[str, str]:
        recipe: dict[str, Any] = dict(report.recipe)
        if not recipe:  # an older or hand-made report: what its stages say
            stages = [stage for variant in report.variants for stage in variant.stages]
            recipe["seed"] = report.seed
            recipe["stages"] = {stage.name: stage.settings for stage in stages}
        found = {path: words.plain(value) for path, value in words.flat(recipe).items()}
        for path, value in words.flat(report.environment).items():
            found[f"environment.{path}"] = words.plain(value)
        return found

    one, two = collect(first), collect(second)
    return [
        (path, one.get(path, "–"), two.get(path, "–"))
        for path in {**one, **two}
        if one.get(path) != two.get(path)
    ]
