"""Files of measured points: a JSON table that grows by every point, and is resumed from.

What a sensitivity analysis of pruning and one of quantization have in common: each evaluation takes
long, so each is on the disk as soon as it is known; a file is used again only for the same network
and the same evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from slimkit.artifact import PathLike, read_json, write_json
from slimkit.errors import ArtifactError, SlimkitError
from slimkit.progress import ProgressDisplay
from slimkit.search.storage import first_difference

__all__ = [
    "check_evaluation",
    "check_question",
    "grow",
    "numbers",
    "read_table",
    "texts",
    "write_table",
]

Table = TypeVar("Table")
Point = TypeVar("Point")

_SAME_BASE = 1e-3
"""Part of a metric by which it may differ between two runs of one evaluation.

One image in a thousand may change sides when sums are added up in another order.
"""
_SAME_FALL = 1e-2
"""The same of how much a metric falls, where the metric of the whole network is small or fixed."""
_NOTHING = 1e-12
"""A metric of this size is a rounding error, as of a difference of a network from itself."""


def write_table(path: PathLike, kind: str, version: int, record: Mapping[str, Any]) -> None:
    """Write a table as JSON, atomically, under its kind and version."""
    write_json(path, {"kind": kind, "version": version, **record})


def read_table(
    path: PathLike,
    kind: str,
    version: int,
    parse: Callable[[Mapping[str, Any]], Table],
    *,
    what: str,
) -> Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: of the file.
        kind: that it must have.
        version: the same.
        parse: record → table.
        what: it should be, in words, for the error.

    Raises:
        ArtifactError: the file is missing, damaged, or something else.
    """
    record = read_json(path)
    try:
        if (record["kind"], record["version"]) != (kind, version):
            raise ValueError(f"it is a {record['kind']!r}, version {record['version']}")
        return parse(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"not a file of {what} ({error})", where=str(path)) from error


def texts(points: Mapping[int, float]) -> dict[str, float]:
    """Points by number as JSON has them, by text."""
    return {str(number): value for number, value in points.items()}


def numbers(points: Mapping[str, Any]) -> dict[int, float]:
    """The inverse of :func:`texts`."""
    return {int(text): float(value) for text, value in points.items()}


def check_question(
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    *,
    where: str,
    message: str,
    error: type[SlimkitError],
) -> None:
    """Make sure that a file answers what is asked here.

    Args:
        there: what its points belong to: hashes of weights, settings …
        here: the same of what is measured now.
        where: the file.
        message: what is wrong if they differ; the first difference is added.
        error: its type.

    Raises:
        SlimkitError: of type ``error``.
    """
    difference = first_difference(dict(there), dict(here))
    if difference is not None:
        raise error(f"{message}: {difference}", where=where, hint="give a new file")


def check_evaluation(
    known: Iterable[tuple[str, float, Callable[[], float]]],
    *,
    where: str,
    error: type[SlimkitError],
) -> None:
    """Measure known points again: a file that another evaluation filled says nothing about this.

    Args:
        known: what was measured, its value in the file, and what measures it now. The first is
            the whole network; how much the others fall below it is compared.
        where: the file.
        error: type of the error.

    Raises:
        SlimkitError: of type ``error``; a value differs by more than rounding explains.
    """
    points = list(known)
    if not points:
        return
    whole = points[0][1]
    fall = max(abs(there - whole) for _, there, _ in points)
    for number, (what, there, measure) in enumerate(points):
        here = measure()
        allowed = _SAME_BASE * abs(whole) + (_SAME_FALL if number else _SAME_BASE) * fall
        if abs(there - here) > max(allowed, _NOTHING):
            scores = f"{what} scores {there:.6g} there and {here:.6g} here"
            raise error(
                f"another evaluation filled it: {scores}",
                where=where,
                hint="evaluate in the same way on the same data, or give a new file",
            )


def grow(
    table: Table,
    measured: Iterable[tuple[Point, float]],
    add: Callable[[Table, Point, float], Table],
    *,
    total: int,
    told: Callable[[Point, Table], str],
    save: Callable[[Table], None] | None = None,
    progress: bool = False,
    patience: float = 0.0,
) -> Table:
    """Take in points as they are measured.

    Args:
        table: what is known so far.
        measured: points with their values, each computed when it is asked for.
        add: table, point and value → the table with that point.
        total: how many points there are.
        told: the point that was just added to a table, in words.
        save: is called with every new table, before the next point is measured.
        progress: show progress on standard error.
        patience: seconds; only if all points together will take longer.
    """
    with ProgressDisplay(
        total, 0, label="sensitivity", enabled=progress, patience=patience
    ) as show:
        for done, (point, value) in enumerate(measured, start=1):
            table = add(table, point, value)
            if save is not None:
                save(table)
            show.step(done, told(point, table))
    return table
