"""A run's events as lines for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

__all__ = ["Narrator", "data_line"]


class Narrator:
    """A listener for :func:`slimkit.recipe.run_recipe`.

    Args:
        console: where lines go.
        quiet: print nothing.

    Attributes:
        finished: the report is complete.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.finished = False
        self._told: set[str] = set()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Print one event."""
        kind = event["event"]
        self.finished = self.finished or kind == "done"
        line = _LINES[kind](event) if kind in _LINES else None
        if line is None or self.quiet or (kind == "cached" and line in self._told):
            return
        self._told.add(line)
        self.console.print(Text(line, style=_STYLES.get(kind, "")))


def _chain(event: Mapping[str, Any]) -> str:
    return " → ".join(event["chain"]) or "the model as it is"


def data_line(event: Mapping[str, Any]) -> str:
    """What the data are: source, images per split, shape."""
    counts = f"{event['train']} train, {event['validation']} validation, {event['test']} test"
    size = "×".join(str(size) for size in event.get("shape", ()))
    shape = f", {size}" if size else ""
    skipped = sum(event.get("skipped", {}).values())
    bad = f", {skipped} unreadable samples left out" if skipped else ""
    return f"data     {event['source']}: {counts}{shape}{bad}"


def _owner(event: Mapping[str, Any]) -> str:
    return str(event.get("variant") or event.get("stage"))


def _damaged(event: Mapping[str, Any]) -> str:
    return str(event.get("stage") or f"{event['kind']}/{str(event['key'])[:8]}…")


def _proof(event: Mapping[str, Any]) -> str:
    size = event["bytes"] / 1000
    return f"proof    {event['variant']}: {event['score']}, {size:,.1f} kB"


def _left(event: Mapping[str, Any]) -> str:
    seconds, stages = event["seconds"], event["stages"]
    about = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    several = "1 stage" if stages == 1 else f"{stages} stages"
    return f"about {about} for {several}, by the speed so far; then the report"


_LINES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "data": data_line,
    "variant": lambda event: f"variant  {event['variant']}: {_chain(event)}",
    "cached": lambda event: f"cached   {_chain(event)}",
    "start": lambda event: f"stage    {_chain(event)}",
    "end": lambda event: f"done     {event['stage']} in {event['seconds']:.1f} s",
    "left": lambda event: f"left     {_left(event)}",
    "waiting": lambda event: f"waiting  another run is working on {event['stage']}",
    "restart": lambda event: f"restart  {event['stage']}: its checkpoint was of another version",
    "damaged": lambda event: f"damaged  {_damaged(event)} in the cache; made again",
    "proof": _proof,
    "warning": lambda event: f"warning  {_owner(event)}: {event['message']}",
    "latency": lambda event: f"latency  measured in {event['seconds']:.1f} s",
}
_STYLES = {
    "variant": "bold",
    "cached": "dim",
    "waiting": "yellow",
    "restart": "yellow",
    "damaged": "yellow",
    "warning": "yellow",
}
