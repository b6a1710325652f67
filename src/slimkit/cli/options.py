"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Checkpoint", "InputShape", "ModelArguments", "ModelName", "TaskName"]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="slimkit:resnet20, torchvision:resnet18, timm:…, or package.module:factory.",
        show_default=False,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="N,C,H,W", help="Shape of the input.", show_default="fits the model"
    ),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--arg", metavar="NAME=VALUE", help="Argument of the factory; may be repeated."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", metavar="FILE", help="Weights: .safetensors, .pt, or a saved folder."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="NAME",
        help="What the network does; see: slimkit list tasks.",
        show_default="what the data are for",
    ),
]
