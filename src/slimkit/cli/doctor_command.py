"""``slimkit doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["doctor_command"]


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is installed, which runtimes work, and what the CPU can do."""
    import json

    from slimkit.cli.console import output
    from slimkit.recipe.cache import default_cache
    from slimkit.runtime.surroundings import environment

    found = environment()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for title, rows in _sections(found).items():
        output.print(title, style="bold")
        for name, value in rows:
            output.print(f"  {name:<14} {value}", markup=False)
    output.print("stage cache", style="bold")
    output.print(f"  {default_cache()}", markup=False)


def _sections(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    cpu = found["cpu"]
    backends = [
        (name, status["version"] or f"missing: {status['reason']}")
        for name, status in found["backends"].items()
    ]
    return {
        "slimkit": [
            ("version", found["slimkit"]),
            ("python", found["python"]),
            ("platform", found["platform"]),
        ],
        "processor": [
            ("name", cpu["name"]),
            ("cores", str(cpu["cores"])),
            ("instructions", ", ".join(cpu["instructions"]) or "none that matter here"),
            ("int8", cpu["int8"]),
            ("GPU", ", ".join(found["gpu"]) or "none"),
        ],
        "packages": [(n, v or "not installed") for n, v in found["packages"].items()],
        "runtimes": backends,
    }
