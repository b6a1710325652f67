"""``slimkit schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["schema_command"]


def schema_command(
    out: Annotated[Path | None, typer.Option("--out", help="Write to a file.")] = None,
) -> None:
    """Print the JSON Schema of recipes, for editors and validators."""
    import json

    from slimkit.artifact import write_json
    from slimkit.recipe import recipe_schema

    schema = recipe_schema()
    if out is not None:
        write_json(out, schema)
    else:
        typer.echo(json.dumps(schema, indent=1))
