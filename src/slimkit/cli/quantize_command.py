"""``slimkit quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli.options import Arguments, Checkpoint, ModelName

__all__ = ["quantize_command"]


def quantize_command(
    model: ModelName,
    data: Annotated[
        str, typer.Option("--data", help="Where calibration images come from, as in a recipe.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The ONNX file to write.")],
    checkpoint: Checkpoint = None,
    arg: Arguments = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, max=4096, help="Height and width.", show_default="of the images"),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Calibration batches of 32 images.")] = 16,
    target: Annotated[str, typer.Option(help="See: slimkit list targets.")] = "onnxruntime",
    mode: Annotated[str, typer.Option(help="static, dynamic or weights.")] = "static",
    granularity: Annotated[str, typer.Option(help="channel, tensor or group.")] = "channel",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs per weight scale.", show_default="32 for group")
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="2 to 8.", show_default="the target's")
    ] = None,
    observer: Annotated[str, typer.Option(help="See: slimkit list observers.")] = "percentile",
    skip: Annotated[
        list[str] | None, typer.Option(help="Layers that stay in float; repeatable.")
    ] = None,
) -> None:
    """Turn a trained network into an ONNX file of integers, without training (PTQ)."""
    import torch

    from slimkit.cli.console import output
    from slimkit.cli.models import parse_arguments
    from slimkit.models import build_model, load_checkpoint
    from slimkit.quantize import ptq
    from slimkit.recipe.prediction import model_metadata
    from slimkit.runtime import export, fusion_report, parity
    from slimkit.tasks import ClassificationTask
    from slimkit.tasks.data import load_data
    from slimkit.tasks.data.settings import DataSettings

    network = build_model(model, **parse_arguments(arg)).eval()
    if checkpoint is not None:
        load_checkpoint(network, checkpoint)
    splits = load_data(DataSettings(source=data, image_size=image_size, eval_batch_size=32))
    ClassificationTask().check_head(network, splits)
    example = torch.zeros(1, *splits.shape)
    quantized = ptq(
        network,
        example,
        calibration=splits.calibration,
        target=target,
        mode=mode,
        granularity=granularity,
        group_size=group_size,
        weight_bits=weight_bits,
        observer=observer,
        skip=skip or (),
        batches=batches,
    )
    metadata = model_metadata(splits.preprocessing, splits.classes)
    written = export(quantized, out, example, metadata=metadata)
    agreement = parity(network, out, splits.calibration.batches(batches))
    output.print(quantized.plan.explain(), markup=False)
    output.print(f"{out}: {written.bytes / 1000:,.1f} kB")
    output.print(f"in ONNX Runtime: {fusion_report(out)}", markup=False)
    output.print(f"against the float network on training images: {agreement}", markup=False)
