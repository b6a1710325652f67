"""The measurement behind a sensitivity analysis: one unit at a time, resumed from a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkit.artifact import PathLike, content_hash, tensors_hash
from slimkit.errors import InputError
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import Inputs
from slimkit.progress import LONG, ProgressDisplay
from slimkit.quantize.evaluating import Evaluate, evaluated
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.sensitivity_table import PLANNED, LayerSensitivity
from slimkit.quantize.outputs.distance import OutputDistance

__all__ = [
    "Scorer",
    "Units",
    "measure_sensitivity",
    "metric_scorer",
    "noise_scorer",
    "units_of",
]

_ALIKE = 1e-3
"""Relative difference up to which two metrics of the float network count as one: threads add up in
other orders, and one image of a thousand may fall to the other side."""

Units = Mapping[str, Sequence[str]]
"""Name → paths of the layers that are switched together."""

Scorer = Callable[[nn.Module, str], float]
"""Network, and the network in words → its metric, or its noise-to-signal ratio."""


def metric_scorer(evaluate: Evaluate) -> Scorer:
    """By the user's metric."""
    return lambda model, what: evaluated(evaluate, model, what)


def noise_scorer(reference: nn.Module, batches: Iterable[Inputs]) -> Scorer:
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
                raise InputError(f"{layer} is in {owner[layer]!r} as well", where=f"groups.{name}")
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
    """Measure what ``file`` does not hold yet, one unit at a time.

    :func:`~slimkit.quantize.sensitivity` says what it means and what can go wrong.

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
    if measure == "metric":  # the noise of the float network is 0 by definition
        base = score(switches.quantized.model, "the float network")
        if table.base is not None and not math.isclose(
            base, table.base, rel_tol=_ALIKE, abs_tol=1e-9
        ):
            raise InputError(
                f"it was measured by another evaluation, or on other data: the float network has "
                f"{table.base:.6g} there, and {base:.6g} now",
                where=str(file),
                hint="give a new file",
            )
        table = table.with_base(base) if table.base is None else table
    todo = table.missing(bits)
    with ProgressDisplay(
        len(todo), 0, label="sensitivity", enabled=progress, patience=LONG
    ) as show:
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
