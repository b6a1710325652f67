"""``slimkit quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkit.cli.mirrored import options_of
from slimkit.cli.options import Checkpoint, ModelArguments, ModelName, TaskName
from slimkit.limits import KINDS, Limit

if TYPE_CHECKING:
    from slimkit.modules import Evaluate
    from slimkit.tasks import Splits, Task

__all__ = ["quantize_command"]


@options_of(Limit, into="limit")
def quantize_command(  # noqa: PLR0913, PLR0917 - one option each
    model: ModelName,
    data: Annotated[
        str, typer.Option("--data", help="Where calibration images come from, as in a recipe.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The ONNX file to write.")],
    task: TaskName = None,
    checkpoint: Checkpoint = None,
    arg: ModelArguments = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=4, max=4096, help="Height and width.", show_default="of the images"),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 32 images, at most.")] = 16,
    mode: Annotated[str, typer.Option(help="static, dynamic or weights.")] = "static",
    granularity: Annotated[str, typer.Option(help="channel, tensor or group.")] = "channel",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs per weight scale.", show_default="32 for group")
    ] = None,
    observer: Annotated[str, typer.Option(help="See: slimkit list observers.")] = "percentile",
    skip: Annotated[
        list[str] | None, typer.Option(help="Layers that stay in float; repeatable.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Runtime to quantize for; see: slimkit list targets.")
    ] = "onnxruntime",
    weight_bits: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BITS | PATTERN=BITS",
            help="Bits of all weights, or of some layers; repeatable.",
            show_default="of the target",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="What else to do, in this order; see: slimkit list methods; repeatable; none for "
            "nothing.",
            show_default="gptq, bias_correction, with few bits bias_tuning, for coarse weights; "
            "else none",
        ),
    ] = None,
    *,
    limit: dict[str, Any],
) -> None:
    """Turn a trained network into an ONNX file of integers, without training (PTQ)."""
    from slimkit.cli.console import note, output
    from slimkit.cli.models import load_task, parse_arguments, parse_weight_bits, with_weights
    from slimkit.models import build_model
    from slimkit.quantize import ptq
    from slimkit.quantize.planning.requests import granularity_of
    from slimkit.runtime import export, fusion_report, parity
    from slimkit.tasks.splits import first_batches

    network = with_weights(build_model(model, **parse_arguments(arg)).eval(), checkpoint)
    kind, splits = load_task(task, data, image_size=image_size, eval_batch_size=32)
    kind.check_head(network, splits)
    batches = min(batches, len(splits.calibration))  # a small folder has fewer
    example = kind.example_inputs(splits)
    quantized = ptq(
        network,
        example,
        calibration=splits.calibration,
        mode=mode,
        granularity=granularity_of(granularity, group_size),
        observer=observer,
        skip=skip or (),
        batches=batches,
        target=target,
        weight_bits=parse_weight_bits(weight_bits),
        methods=[] if method == ["none"] else method or None,
        limit=_limit(limit, kind, splits),
        progress=True,
    )
    written = export(
        kind.exported(quantized, splits),
        out,
        kind.prepare(example),
        metadata=kind.metadata(splits),
        **kind.export_options(splits),
    )
    calls = (kind.prepare(b.inputs) for b in first_batches(splits.calibration, batches))
    agreement = parity(kind.exported(network, splits), out, calls)
    output.print(quantized.plan.explain(), markup=False)
    output.print(f"{out}: {written.bytes / 1000:,.1f} kB", markup=False)
    output.print(f"in ONNX Runtime: {fusion_report(out)}", markup=False)
    output.print(f"against the float network on training data: {agreement}", markup=False)
    if checkpoint is None and not arg:
        note("its weights are random: no --checkpoint was given")


def _limit(settings: dict[str, Any], task: Task, splits: Splits) -> Limit | None:
    """What the options say; None where they ask for no limit."""
    if settings["fewest"] == "layers" and all(settings[name] is None for name in KINDS):
        return None
    evaluate = None if settings["max_drop"] is None else _on_validation_data(task, splits)
    return Limit(**settings, evaluate=evaluate)


def _on_validation_data(task: Task, splits: Splits) -> Evaluate:
    """The metric that decides; more is better."""
    from slimkit.errors import DataError

    samples, metric = splits.validation, task.metric
    if samples is None:
        raise DataError("it is measured on validation data, and there are none", where="--max-drop")
    return lambda model: metric.goodness(task.evaluate(model, samples)[metric.name])
