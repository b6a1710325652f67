"""``slimkit profile``."""

from __future__ import annotations

from typing import Annotated

import typer

from slimkit.cli.options import Checkpoint, InputShape, ModelArguments

__all__ = ["profile_command"]


def profile_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="slimkit:resnet20, torchvision:resnet18, …, or an ONNX file.",
            show_default=False,
        ),
    ],
    input_shape: InputShape = None,
    arg: ModelArguments = None,
    checkpoint: Checkpoint = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Size of an open dimension of a file: height=320."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Fold deeper layers into their parents.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count parameters, MACs, BOPs and bytes, layer by layer.

    Example: slimkit profile torchvision:mobilenet_v2 --depth 2
    """
    import json

    from slimkit.cli.console import output
    from slimkit.cli.models import model_and_input, parse_sizes
    from slimkit.measure import profile
    from slimkit.measure.onnx_profile import profile_file

    if model.endswith(".onnx"):
        found = profile_file(model, parse_sizes(size))
    else:
        found = profile(*model_and_input(model, input_shape, arg, checkpoint))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    output.print(found.table(depth=depth))
    output.print(found.summary())
