"""Numbers and tables for people: how profiles, plans and reports are printed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from slimkit.terminal import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["human_bytes", "human_count", "percent", "rendered"]


def human_count(value: float) -> str:
    """Three or four digits with a decimal prefix: ``11.69 M``, ``9.41 k``."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.{2 if abs(scaled) < 100 else 1}f} {unit}"
    return f"{value:.0f}"


def human_bytes(value: float) -> str:
    """Bytes with a decimal prefix: ``46.8 MB``."""
    return f"{value:.0f} B" if abs(value) < 1000 else human_count(value) + "B"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole`` in percent, one digit; empty when there is nothing to divide by."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def rendered(thing: RenderableType, *, width: int = 140) -> str:
    """Plain text of a rich table or text, without colours or trailing blanks.

    Args:
        thing: what rich can print.
        width: columns; a table takes no more than it needs.
    """
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, legacy_windows=False)
    console.print(thing)
    text = visible(buffer.getvalue())
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())
