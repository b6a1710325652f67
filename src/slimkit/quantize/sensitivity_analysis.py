"""Which layers lose most by being quantized: one at a time, the others in float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.graph.patterns import Pattern
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.modules import Evaluate
from slimkit.quantize.batches import Batches
from slimkit.quantize.calibration import attach, calibrate
from slimkit.quantize.evaluating import refuse_test_data
from slimkit.quantize.layer_choice.layer_sensitivity import (
    measure_sensitivity,
    metric_scorer,
    noise_scorer,
    units_of,
)
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.sensitivity_table import LayerSensitivity
from slimkit.quantize.observers.ranges import Observer
from slimkit.quantize.targets import Target, resolve_target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["calibrated", "sensitivity"]


@door
def sensitivity(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any],
    evaluate: Evaluate | None = None,
    bits: int | Sequence[int] = 8,
    groups: Mapping[str, Pattern | Iterable[Pattern]] | None = None,
    leave_one_out: bool = False,
    target: str | Target = "onnxruntime",
    granularity: str = "channel",
    observer: str | Observer = "minmax",
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
    file: PathLike | None = None,
    progress: bool = True,
) -> LayerSensitivity:
    """Quantize every layer alone and see what the network loses.

    The network is captured and calibrated once. A layer takes its activations along: its input
    and output are rounded as well as its weight. The cost is one evaluation per layer and
    width, and two more.

    Args:
        model: any module; it is copied, not changed.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data, as for :func:`~slimkit.quantize.ptq`.
        evaluate: network → metric on validation data, higher is better. Without it outputs are
            compared with those of the float network on the calibration batches, which are then
            held in memory: signal to quantization noise (SQNR), no labels needed.
        bits: widths of the weights to measure at, each 2 to 8.
        groups: name → patterns of the layers that are switched together, such as the layers of
            a block; every other layer is one by itself.
        leave_one_out: the other way round: everything is quantized but the layer.
        target: the runtime whose integer operators the scheme must fit.
        granularity: one weight scale per output ``"channel"`` or per ``"tensor"``.
        observer: how ranges of activations are found.
        skip: modules that stay in float all the time.
        batches: use so many batches; all by default.
        file: JSON that every point is added to as soon as it is measured; what it holds is not
            measured again, but for two points that show whether ``evaluate`` is the same. None
            keeps nothing.
        progress: show progress on standard error if it takes over ten seconds.

    Returns:
        A table, most damaging layers first when printed.

    Raises:
        UnknownNameError, PatternError, InputError, DataError, CaptureError: as for
            :func:`~slimkit.quantize.ptq`; also if ``file`` belongs to another network or
            another evaluation.
        EvaluationError: ``evaluate`` failed or gave no finite number; ``file`` keeps the rest.
        ArtifactError: the file cannot be read or written.
    """
    if evaluate is not None:
        refuse_test_data(evaluate)
    widths = (bits,) if isinstance(bits, int) else tuple(bits)
    resolved = resolve_target(target)
    quantized, data = calibrated(
        model,
        example_inputs,
        calibration,
        target=resolved,
        granularity=granularity,
        observer=observer,
        skip=skip,
        batches=batches,
    )
    switches = LayerSwitches(quantized, target=resolved)
    return measure_sensitivity(
        switches,
        noise_scorer(quantized.model, data) if evaluate is None else metric_scorer(evaluate),
        measure="sqnr" if evaluate is None else "metric",
        units=units_of(switches, groups),
        bits=widths,
        leave_one_out=leave_one_out,
        file=file,
        progress=progress,
    )


def calibrated(
    model: nn.Module,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    *,
    target: Target,
    granularity: str,
    observer: str | Observer,
    skip: Pattern | Iterable[Pattern],
    batches: int | None,
) -> tuple[QuantizedModel, list[Inputs]]:
    """The network with every layer integer, and the batches on its device, held in memory."""
    quantized = attach(
        model,
        example_inputs,
        target=target,
        granularity=granularity,
        observer=observer,
        skip=skip,
    ).eval()
    device = next((p.device for p in quantized.parameters()), torch.device("cpu"))
    data = [batch.to(device) for batch in Batches(calibration, as_inputs(example_inputs), batches)]
    calibrate(quantized, data, observer=observer)
    return quantized, data
