"""The measurement behind a sensitivity analysis: one unit at a time, resumed from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkit.artifact import PathLike, content_hash, tensors_hash
from slimkit.errors import InputError
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import Inputs
from slimkit.modules import Evaluate
from slimkit.progress import LONG
from slimkit.quantize.evaluating import evaluated
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.sensitivity_table import PLANNED, LayerSensitivity
from slimkit.quantize.outputs.distance import OutputDistance
from slimkit.search.measured_points import check_evaluation, grow

__all__ = [
    "Scorer",
    "Units",
    "measure_sensitivity",
    "metric_scorer",
    "noise_scorer",
    "units_of",
]

Units = Mapping[str, Sequence[str]]
"""Name → paths of the layers that are switched together."""

_FLOAT = "the float network"

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
        file: grows by every point; what another ``score`` filled is refused.
        progress: show progress on standard error.
    """
    if not units:
        raise InputError("no layer of the network can be quantized", where="model")
    if not bits or any(isinstance(b, bool) or not isinstance(b, int) for b in bits):
        raise InputError(f"expected whole numbers from 2 to 8, got {bits!r}", where="bits")
    table = LayerSensitivity.empty(
        units, measure, leave_one_out=leave_one_out, identity=_identity(switches)
    )

    def value(unit: str | None, width: int) -> float:
        off = _off(switches, units, unit, leave_one_out=leave_one_out)
        widths = dict.fromkeys(switches.layers, width) if width else {}
        with switches.set(off, widths) as network:
            return score(network, words(unit, width))

    def words(unit: str | None, width: int) -> str:
        return _in_words(unit, width, leave_one_out=leave_one_out)

    def base() -> float:
        return score(switches.quantized.model, _FLOAT) if measure == "metric" else 0.0

    if file is not None and Path(file).exists():
        table = table.joined(LayerSensitivity.load(file), where=str(file))
        check_evaluation(_known(table, bits, base, value), where=str(file), error=InputError)
    if table.base is None:
        table = table.with_base(base())
    todo = table.missing(bits)
    return grow(
        table,
        ((point, value(*point)) for point in todo),
        lambda known, point, found: known.with_point(*point, found),
        total=len(todo),
        told=lambda point, known: f"{words(*point)}: {known.told(*point)}",
        save=None if file is None else lambda known: known.save(file),
        progress=progress,
        patience=LONG,
    ).of(bits)


def _known(
    table: LayerSensitivity,
    bits: Sequence[int],
    base: Callable[[], float],
    value: Callable[[str | None, int], float],
) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """The float network, and the one with everything quantized, to measure again."""
    if table.base is not None:
        yield _FLOAT, table.base, base
    width = next((width for width in (*bits, *table.quantized) if width in table.quantized), None)
    if width is not None:
        what = _in_words(None, width, leave_one_out=False)
        yield what, table.quantized[width], lambda: value(None, width)


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
