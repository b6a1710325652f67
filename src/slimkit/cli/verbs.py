"""The verbs and the files that they live in, imported when they are called for."""

from __future__ import annotations

import importlib

import typer

__all__ = ["VERBS", "register"]

VERBS = (
    "run",
    "profile",
    "explain",
    "benchmark",
    "export",
    "evaluate",
    "predict",
    "quantize",
    "teach",
    "compare",
    "report",
    "list",
    "cache",
    "schema",
    "doctor",
)


def register(app: typer.Typer, verb: str) -> None:
    """Add ``slimkit VERB`` from ``slimkit/cli/VERB_command.py``, a command or a group of them."""
    module = importlib.import_module(f"slimkit.cli.{verb}_command")
    group = getattr(module, f"{verb}_app", None)
    if group is not None:
        app.add_typer(group, name=verb)
    else:
        app.command(verb)(getattr(module, f"{verb}_command"))
