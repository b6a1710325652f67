"""What every benchmark shares: where tables go, how they look, what they say of the machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from slimkit.artifact import write_text
from slimkit.runtime.surroundings import environment

__all__ = ["PAGES", "ROOT", "machine", "markdown", "mean_spread", "write_page"]

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "benchmarks"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|---|" + "---:|" * (len(header) - 1))
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def mean_spread(values: Sequence[float], *, sign: bool = False, digits: int = 2) -> str:
    """``mean (min … max)`` of the runs; a single run is shown alone."""
    plus = "+" if sign else ""
    shown = [f"{value:{plus}.{digits}f}" for value in values]
    if len(shown) == 1:
        return shown[0]
    mean = statistics.fmean(values)
    low, high = f"{min(values):{plus}.{digits}f}", f"{max(values):{plus}.{digits}f}"
    return f"**{mean:{plus}.{digits}f}** ({low} … {high})"


def machine() -> str:
    """One line on the processor and the versions that a figure depends on."""
    facts = environment()
    cpu, packages = facts["cpu"], facts["packages"]
    features = ", ".join(cpu["instructions"])
    shown = [f"{name} {packages[name]}" for name in ("torch", "onnxruntime")]
    cores = "1 core" if cpu["cores"] == 1 else f"{cpu['cores']} cores"
    return "; ".join([f"{cpu['name']}, {cores} ({features})", *shown])


def write_page(name: str, title: str, command: str, sections: Sequence[str]) -> Path:
    """Write ``docs/benchmarks/NAME.md`` with the command, the day and the machine on top."""
    head = (
        f"# {title}\n\nMeasured {date.today().isoformat()} by\n\n"
        f"```\n{command}\n```\n\non: {machine()}.\n"
    )
    path = PAGES / f"{name}.md"
    write_text(path, head + "\n" + "\n\n".join(sections) + "\n")
    return path
