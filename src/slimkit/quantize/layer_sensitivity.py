"""Which layers lose most by being quantized: one at a time, the others in float."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkit.artifact import PathLike, content_hash, tensors_hash
from slimkit.errors import InputError
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.progress import ProgressDisplay
from slimkit.quantize.batches import Batches
from slimkit.quantize.calibration import attach, calibrate
from slimkit.quantize.evaluating import Evaluate, evaluated, refuse_test_data
from slimkit.quantize.layer_switches import LayerSwitches
from slimkit.quantize.output_distance import OutputDistance
from slimkit.quantize.sensitivity_table import PLANNED, LayerSensitivity
from slimkit.quantize.targets import Target, resolve_target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = [
    "Scorer",
    "Units",
    "calibrated",
    "measure_sensitivity",
    "metric_scorer",
    "noise_scorer",
    "sensitivity",
    "units_of",
]

Units = Mapping[str, Sequence[str]]
"""Name → paths of the layers that are switched together."""


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
    observer: str = "minmax",
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
    file: PathLike | None = None,
    progress: bool = False,
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
        target, granularity, observer, skip, batches: as for :func:`~slimkit.quantize.ptq`.
        file: JSON that every point is added to as soon as it is measured; what it holds is not
            measured again. None keeps nothing.
        progress: show progress on standard error.

    Returns:
        A table, most damaging layers first when printed.

    Raises:
        UnknownNameError, PatternError, InputError, DataError, CaptureError: as for
            :func:`~slimkit.quantize.ptq`; also if ``file`` belongs to another network.
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
    switches = LayerSwitches(quantized, float_outputs=resolved.float_outputs)
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
    observer: str,
    skip: Pattern | Iterable[Pattern],
    batches: int | None,
) -> tuple[QuantizedModel, list[Any]]:
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


Scorer = Callable[[nn.Module, str], float]
"""Network, and the network in words → its metric, or its noise-to-signal ratio."""


def metric_scorer(evaluate: Evaluate) -> Scorer:
    """By the user's metric."""
    return lambda model, what: evaluated(evaluate, model, what)


def noise_scorer(reference: nn.Module, batches: Iterable[Any]) -> Scorer:
    """By the noise in the outputs, against ``reference``, the float network."""
    distance = OutputDistance(reference.eval(), batches)
    return lambda model, _what: distance.noise(model)


def units_of(
    switches: LayerSwitches, groups: Mapping[str, Pattern | Iterable[Pattern]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Groups and single layers in order of execution: name → layers.

    Raises:
        PatternError: a pattern matches nothing.
        InputError: a group holds no integer layer, or two hold the same.
    """
    owner: dict[str, str] = {}
    for name, patterns in (groups or {}).items():
        matched = match_modules(switches.quantized.model, patterns, where=f"groups.{name}")
        inside = [layer for layer in switches.layers if layer in matched]
        if not inside:
            raise InputError("no integer layer is in it", where=f"groups.{name}")
        for layer in inside:
            if layer in owner:
                raise InputError(
                    f"{layer} is in {owner[layer]!r} as well", where=f"groups.{name}"
                )
            owner[layer] = name
    units: dict[str, list[str]] = {}
    for layer in switches.layers:
        units.setdefault(owner.get(layer, layer), []).append(layer)
    return {name: tuple(layers) for name, layers in units.items()}


def measure_sensitivity(
    switches: LayerSwitches,
    score: Scorer,
    *,
    measure: str,
    units: Units,
    bits: Sequence[int] = (PLANNED,),
    leave_one_out: bool = False,
    file: PathLike | None = None,
    progress: bool = False,
) -> LayerSensitivity:
    """Measure what ``file`` does not hold yet; see :func:`sensitivity`.

    Args:
        switches: of the calibrated network.
        score: what is compared.
        measure: ``"metric"`` or ``"sqnr"``, which ``score`` gives as noise / signal.
        units: what is switched together.
        bits: widths of weights; 0 for those that the plan has.
        leave_one_out: everything is quantized but one unit.
        file: grows by every point.
        progress: show progress on standard error.
    """
    if not units:
        raise InputError("no layer of the network can be quantized", where="model")
    if not bits or any(isinstance(b, bool) or not isinstance(b, int) for b in bits):
        raise InputError(f"expected whole numbers from 2 to 8, got {bits!r}", where="bits")
    table = LayerSensitivity.empty(
        units, measure, leave_one_out=leave_one_out, identity=_identity(switches)
    )
    if file is not None and Path(file).exists():
        table = table.joined(LayerSensitivity.load(file), where=str(file))
    if table.base is None:
        table = table.with_base(score(switches.quantized.model, "the float network"))
    todo = table.missing(bits)
    with ProgressDisplay(len(todo), 0, label="sensitivity", enabled=progress) as show:
        for done, (unit, width) in enumerate(todo, start=1):
            off = _off(switches, units, unit, leave_one_out=leave_one_out)
            widths = dict.fromkeys(switches.layers, width) if width else {}
            what = _in_words(unit, width, leave_one_out=leave_one_out)
            with switches.set(off, widths) as network:
                table = table.with_point(unit, width, score(network, what))
            if file is not None:
                table.save(file)
            show.step(done, f"{what}: {table.told(unit, width)}")
    return table.of(bits)


def _off(
    switches: LayerSwitches, units: Units, unit: str | None, *, leave_one_out: bool
) -> set[str]:
    """What is in float at one point."""
    if unit is None:
        return set()
    if leave_one_out:
        return set(units[unit])
    return set(switches.layers) - set(units[unit])


def _in_words(unit: str | None, width: int, *, leave_one_out: bool) -> str:
    at = f" at {width} bits" if width else ""
    if unit is None:
        return f"everything quantized{at}"
    return f"everything{at} but {unit}" if leave_one_out else f"{unit} alone{at}"


def _identity(switches: LayerSwitches) -> dict[str, Any]:
    """What a table belongs to: weights, scheme and ranges."""
    quantized = switches.quantized
    weights = {
        name: tensors_hash({"": tensor})[:16]
        for name, tensor in quantized.model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    ranges = hashlib.sha256()
    for name, quantizer in sorted(quantized.activation_quantizers().items()):
        state = tensors_hash(dict(quantizer.state_dict()))
        ranges.update(f"{name} {state}".encode())
    plan = quantized.plan
    return {
        "target": plan.target,
        "granularity": plan.granularity,
        "observer": plan.observer,
        "scheme": content_hash(plan.to_json())[:16],
        "weights": weights,
        "calibration": ranges.hexdigest()[:16],
    }
