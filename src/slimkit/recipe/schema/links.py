"""Links of a chain: a stage by its name, or one of several networks that it leaves, STAGE.PART."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from slimkit.errors import nearest
from slimkit.recipe.stages.interface import Stage

__all__ = ["LINK", "all_links", "full_link", "link_problem", "part_of", "parts_problem", "stage_of"]

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
LINK = rf"^{_NAME}(\.{_NAME})?$"
"""What a link looks like."""


def stage_of(link: str) -> str:
    """The stage that a link names."""
    return link.partition(".")[0]


def part_of(link: str) -> str | None:
    """Which of the stage's networks it names, if it says so."""
    return link.partition(".")[2] or None


def full_link(link: str, stages: Mapping[str, Stage]) -> str:
    """The link with the part that the stage leaves by default, where it names none."""
    stage = stages.get(link)
    part = stage.default_part() if stage is not None and stage.parts() else None
    return link if part is None else f"{link}.{part}"


def all_links(stages: Mapping[str, Stage]) -> list[str]:
    """Everything that a chain can name."""
    links: list[str] = []
    for name, stage in stages.items():
        parts = [f"{name}.{part}" for part in stage.parts()]
        links += parts if parts and stage.default_part() is None else [name, *parts]
    return links


def link_problem(
    link: str, stages: Mapping[str, Stage], *, others: Iterable[str] | None = None
) -> tuple[str, str] | None:
    """What is wrong with a link, and the nearest that would do; None if nothing is.

    Args:
        link: as it is written.
        stages: of the recipe.
        others: what could stand here beside a link, if it is a teacher's name.
    """
    name, dot, part = link.partition(".")
    if name not in stages:
        kind = "stage" if others is None else "teacher and no stage"
        called = repr(link) if others is None else f"called {link!r}"
        return f"there is no {kind} {called}", nearest(link, [*all_links(stages), *(others or ())])
    parts = stages[name].parts()
    choices = [f"{name}.{each}" for each in parts]
    if dot and not parts:
        return f"{name} leaves one network, there is no {link!r}", f"write {name}"
    if dot and part not in parts:
        return f"{name} leaves no network {part!r}", nearest(link, choices)
    if not dot and parts and stages[name].default_part() is None:
        return f"{name} leaves several networks", f"write {' or '.join(choices)}"
    return None


def parts_problem(stage: Stage) -> str | None:
    """What is wrong with the names of a stage's parts; they are parts of paths, too."""
    parts, default = stage.parts(), stage.default_part()
    for number, part in enumerate(parts):
        if not re.fullmatch(_NAME, part):
            return f"{part!r} is no name for a part: letters, digits, _ and -"
        if part in parts[:number]:
            return f"two parts are called {part!r}"
    if default is not None and default not in parts:
        return f"its default part {default!r} is none of its parts: {', '.join(parts) or 'none'}"
    return None
