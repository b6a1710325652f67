"""``slimkit profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from slimkit.cli.options import InputShape, ModelArguments, ModelName

__all__ = ["profile_command"]


def profile_command(
    model: ModelName,
    input_shape: InputShape = None,
    arg: ModelArguments = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Fold deeper layers into their parents.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count parameters, MACs, BOPs and bytes, layer by layer."""
    import json

    from slimkit.cli.console import output
    from slimkit.cli.models import model_and_input
    from slimkit.measure import profile

    network, example = model_and_input(model, input_shape, arg)
    found = profile(network, example)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    output.print(found.table(depth=depth))
    output.print(found.summary())
