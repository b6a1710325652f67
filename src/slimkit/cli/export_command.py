"""``slimkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimkit.cli.options import Checkpoint, InputShape, ModelArguments, ModelName

__all__ = ["export_command"]


def export_command(
    model: ModelName,
    out: Annotated[Path, typer.Option("--out", help="The ONNX file to write.")],
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, max=4096, help="Height and width, in place of --input."),
    ] = None,
    arg: ModelArguments = None,
    dynamic_batch: Annotated[
        bool, typer.Option(help="Leave the number of samples per call open.")
    ] = True,
    opset: Annotated[int, typer.Option(min=18, max=25, help="ONNX operator set.")] = 21,
) -> None:
    """Write a model, or a saved folder's, as an ONNX file that was checked against PyTorch.

    Example: slimkit export slimkit:resnet20 --checkpoint weights.safetensors --out model.onnx
    """
    from slimkit.cli.console import note, output
    from slimkit.cli.models import model_and_input, sized
    from slimkit.inputs import as_inputs
    from slimkit.runtime import export, parity

    if out.suffix != ".onnx":
        from slimkit.errors import InputError

        raise InputError(
            f"expected a file NAME.onnx, got {str(out)!r}",
            where="--out",
            hint=f"--out {out / 'model.onnx' if out.is_dir() else out.with_suffix('.onnx')}",
        )
    network, example = model_and_input(model, sized(input_shape, image_size, arg), arg, checkpoint)
    written = export(network, out, example, dynamic_batch=dynamic_batch, opset=opset)
    output.print(f"{out}: {written.bytes / 1000:,.1f} kB", markup=False)
    output.print(f"against PyTorch: {parity(network, out, [as_inputs(example)])}", markup=False)
    if checkpoint is None and not arg:
        note("its weights are random: no --checkpoint was given")
