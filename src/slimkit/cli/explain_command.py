"""``slimkit explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from slimkit.cli.options import Checkpoint, InputShape, ModelArguments, ModelName

__all__ = ["explain_command"]


def explain_command(
    model: ModelName,
    input_shape: InputShape = None,
    arg: ModelArguments = None,
    checkpoint: Checkpoint = None,
    ratio: Annotated[
        float | None, typer.Option(help="Fraction of the channels to remove.", show_default="0.5")
    ] = None,
    macs: Annotated[float | None, typer.Option(help="Fraction of the MACs to remove.")] = None,
    params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters to remove.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="Which channels matter least.")] = "l2",
    allocation: Annotated[str, typer.Option(help="How the target is spread.")] = "uniform",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers that keep their channels; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Layers that alone lose channels; repeatable.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="heads, or channels (of every head).", show_default="what fits"),
    ] = None,
    round_to: Annotated[int, typer.Option(help="Kept channels are a multiple of this.")] = 8,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
) -> None:
    """Show which channels would be pruned, layer by layer, and why some cannot."""
    from slimkit import prune
    from slimkit.cli.console import output
    from slimkit.cli.models import model_and_input

    network, example = model_and_input(model, input_shape, arg, checkpoint)
    if ratio is None and macs is None and params is None:
        ratio = 0.5
    plan = prune.plan(
        network,
        example,
        ratio=ratio,
        macs=macs,
        params=params,
        criterion=criterion,
        allocation=allocation,
        ignore=ignore or (),
        only=only or (),
        attention=cast(Any, attention),  # plan() names the choices
        round_to=round_to,
    )
    output.print(plan.explain(), markup=False)
    if save is not None:
        plan.save(save)
