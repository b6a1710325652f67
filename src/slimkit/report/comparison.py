"""Reports side by side: what was set differently, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimkit.errors import InputError
from slimkit.report import words
from slimkit.report.reading import Report, Variant, load_report

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slimkit.artifact import PathLike

__all__ = ["Comparison", "compare"]

Row = tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What differs between reports. Print it with rich, or take :meth:`markdown`.

    Attributes:
        names: of the reports, A, B and so on, in their order.
        rows: (variant, figure, in A, in B, …, change from A to the last), as written in reports.
        settings: (path in the recipe, value in A, value in B, …) of what was set differently.
        only: name of a report → variants that no other has.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    settings: tuple[Row, ...]
    only: Mapping[str, tuple[str, ...]]

    @property
    def only_a(self) -> tuple[str, ...]:
        """Variants that only the first report has."""
        return self.only[self.names[0]]

    @property
    def only_b(self) -> tuple[str, ...]:
        """Variants that only the second report has."""
        return self.only[self.names[1]]

    def _notes(self) -> list[str]:
        return [
            f"only in {name}: {', '.join(variants)}"
            for name, variants in self.only.items()
            if variants
        ]

    def _tables(self) -> list[tuple[Row, tuple[Row, ...]]]:
        change = "change" if len(self.names) == 2 else f"{self.names[0]} → {self.names[-1]}"
        figures = ("variant", "figure", *self.names, change)
        tables = [(figures, self.rows), (("setting", *self.names), self.settings)]
        return [table for table in tables if table[1]]

    def markdown(self) -> str:
        """Two Markdown tables: the figures and the settings that differ."""
        parts = [_markdown_table(header, rows) for header, rows in self._tables()]
        return "\n\n".join([*parts, *self._notes()]) + "\n"

    def __rich__(self) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        parts: list[RenderableType] = []
        for header, rows in self._tables():
            table = Table(box=box.SIMPLE_HEAD)
            of_figures = header[0] == "variant"
            for number, title in enumerate(header):
                right = of_figures and number > 1
                table.add_column(title, justify="right" if right else "left", overflow="fold")
            previous = ""
            for row in rows:
                same = of_figures and row[0] == previous
                if of_figures and previous and not same:
                    table.add_section()
                previous = row[0]
                table.add_row("" if same else escape(row[0]), *(escape(cell) for cell in row[1:]))
            parts.append(table)
        return Group(*parts, *(escape(note) for note in self._notes()))


def _markdown_table(header: Row, rows: tuple[Row, ...]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def compare(*reports: Mapping[str, Any] | PathLike) -> Comparison:
    """Compare two reports or more, variant by variant.

    Variants belong together by their names. What has a name of its own is put beside the variant
    at the same place of the first report, if that has a name of its own, too.

    Args:
        *reports: the contents of a ``report.json``, its path, or the folder of a run.

    Raises:
        InputError: there are fewer than two.
        ArtifactError: one of them is no report.
    """
    if len(reports) < 2:
        raise InputError("expected two reports or more", where="compare", hint="compare A B")
    found = [load_report(report) for report in reports]
    names = tuple(_letters(number) for number in range(len(found)))
    partners = [_partners(found[0], other) for other in found[1:]]
    rows: list[Row] = []
    for variant in found[0].variants:
        beside = [partner.get(variant.name) for partner in partners]
        if any(beside):
            rows.extend(_variant_rows(found, [variant, *beside]))
    taken = [{each.name for each in partner.values()} for partner in partners]
    only = {
        names[0]: tuple(v.name for v in found[0].variants if not any(v.name in p for p in partners))
    }
    for name, report, used in zip(names[1:], found[1:], taken, strict=True):
        only[name] = tuple(v.name for v in report.variants if v.name not in used)
    return Comparison(names, tuple(rows), tuple(_different_settings(found)), only)


def _letters(number: int) -> str:
    """Name a report by its number: A to Z, then A1 and so on."""
    turn, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(turn) if turn else "")


def _partners(first: Report, other: Report) -> dict[str, Variant]:
    """Name of a variant of the first report → what stands beside it in another one."""
    by_name = {variant.name: variant for variant in other.variants}
    own = {variant.name for variant in first.variants}
    partners = {name: by_name[name] for name in own if name in by_name}
    for one, two in zip(first.variants, other.variants, strict=False):
        if one.name not in by_name and two.name not in own:
            partners[one.name] = two
    return partners


def _variant_rows(reports: list[Report], variants: list[Variant | None]) -> list[Row]:
    rows: list[Row] = []
    first, one = reports[0], variants[0]
    assert one is not None
    others = {v.name for v in variants if v is not None and v.name != one.name}
    label = " / ".join([one.name, *sorted(others)])

    def add(title: str, cells: list[str], change: str) -> None:
        rows.append((label, title, *cells, change))

    alike = [r.metric == first.metric for r in reports]
    scores = [
        report.score(v) if v is not None and same else None
        for report, v, same in zip(reports, variants, alike, strict=True)
    ]
    if scores[0] is not None and any(score is not None for score in scores[1:]):
        head = first.head
        last = scores[-1]
        change = head.change(last - scores[0]) if last is not None else _MISSING
        add(head.title, [_MISSING if s is None else head.plain(s) for s in scores], change)
    for key, title, write in (
        ("params", "params", words.count),
        ("macs", "MACs", words.count),
        ("bytes", "file", words.size),
    ):
        _add_figures(add, title, [v.cost.get(key) if v else None for v in variants], write)
    for item in one.latency:
        times = [v.median_ms(item.setting) if v else None for v in variants]
        _add_figures(add, item.label, times, words.milliseconds)
    return rows


_MISSING = "–"


def _add_figures(
    add: Callable[[str, list[str], str], None],
    title: str,
    values: Sequence[float | None],
    write: Callable[[float], str],
) -> None:
    """A row of figures, if the first report and another one have it."""
    if values[0] is None or all(value is None for value in values[1:]):
        return
    last = values[-1]
    change = words.change(last, values[0]) if last is not None else _MISSING
    add(title, [_MISSING if value is None else write(value) for value in values], change)


def _different_settings(reports: list[Report]) -> list[Row]:
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

    found = [collect(report) for report in reports]
    paths = list(dict.fromkeys(path for settings in found for path in settings))
    rows = [(path, *(settings.get(path, _MISSING) for settings in found)) for path in paths]
    return [row for row in rows if len(set(row[1:])) > 1]
