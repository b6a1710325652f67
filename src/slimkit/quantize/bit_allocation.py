"""Mixed precision: the bits of each layer's weights under a budget for the whole network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.graph.patterns import Pattern
from slimkit.inputs import ExampleInputs
from slimkit.measure.profiling import profile
from slimkit.measure.tables import human_bytes, percent, rendered
from slimkit.modules import Evaluate
from slimkit.quantize.evaluating import refuse_test_data
from slimkit.quantize.layer_choice.choice_knapsack import choose_within
from slimkit.quantize.layer_choice.layer_sensitivity import (
    measure_sensitivity,
    metric_scorer,
    noise_scorer,
    units_of,
)
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.sensitivity_table import LayerSensitivity
from slimkit.quantize.observers.ranges import Observer
from slimkit.quantize.outputs.distance import decibels
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.sensitivity_analysis import calibrated
from slimkit.quantize.specs import named_weights
from slimkit.quantize.targets import Target, resolve_target

__all__ = ["BitAllocation", "LayerBits", "mixed_precision"]


@dataclass(frozen=True)
class LayerBits:
    """What one layer was given.

    Attributes:
        layer: module path.
        bits: of its weights.
        weights: number of them.
        bops: bit operations: MACs × weight bits × activation bits.
        loss: what its rounding alone costs: noise / signal of the outputs, or the fall of the
            metric.
    """

    layer: str
    bits: int
    weights: int
    bops: int
    loss: float


@dataclass(frozen=True)
class BitAllocation(Mapping[str, int]):
    """Module path → weight bits, as ``weight_bits=`` and recipes take it; prints as a table.

    Attributes:
        layers: one row per layer, in order of execution.
        measure: what losses are: ``"sqnr"`` (noise / signal) or ``"metric"``.
        size_removed: fraction of the weights' bytes that is gone against the target's own bits.
        bops_removed: fraction of the bit operations, likewise.
    """

    layers: tuple[LayerBits, ...]
    measure: str
    size_removed: float
    bops_removed: float

    def __getitem__(self, layer: str) -> int:
        return {row.layer: row.bits for row in self.layers}[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(row.layer for row in self._inner_first())

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def loss(self) -> float:
        """The sum over all layers, which the allocation made as small as the budget allows."""
        return sum(row.loss for row in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Everything."""
        return {**asdict(self), "layers": [asdict(row) for row in self.layers]}

    def __str__(self) -> str:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("layer", no_wrap=True)
        loss = "alone" if self.measure == "sqnr" else "costs alone"
        for heading in ("bits", "weights", "share", loss):
            table.add_column(heading, justify="right", no_wrap=True)
        size = sum(row.weights * row.bits for row in self.layers)
        for row in self.layers:
            cells = (str(row.bits), human_bytes(row.weights * row.bits / 8))
            share = percent(row.weights * row.bits, size)
            table.add_row(row.layer, *cells, share, self._told(row.loss))
        return f"{self._head()}\n{rendered(table, width=200)}"

    def _head(self) -> str:
        widths = sorted({row.bits for row in self.layers})
        counts = ", ".join(
            f"{sum(row.bits == width for row in self.layers)} layers at {width} bits"
            for width in widths
        )
        return (
            f"{counts}: {100 * self.size_removed:.1f} % of the weights' bytes and "
            f"{100 * self.bops_removed:.1f} % of the BOPs removed, "
            f"{'noise' if self.measure == 'sqnr' else 'loss'} summed {self._told(self.loss)}"
        )

    def _told(self, loss: float) -> str:
        if self.measure == "metric":
            return f"{loss:.4g}"
        return f"{decibels(loss):.1f} dB" if loss > 0 else "exact"

    def _inner_first(self) -> Sequence[LayerBits]:
        """A pattern takes in what lies below it: modules inside of others come before them."""
        paths = [row.layer for row in self.layers]
        holds = {path for path in paths if any(other.startswith(f"{path}.") for other in paths)}
        return sorted(self.layers, key=lambda row: -row.layer.count(".") if holds else 0)


@door
def mixed_precision(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any],
    size: float | None = None,
    bops: float | None = None,
    bits: Sequence[int] = (4, 8),
    evaluate: Evaluate | None = None,
    target: str | Target = "onnxruntime",
    granularity: str = "channel",
    observer: str | Observer = "minmax",
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
    file: PathLike | None = None,
    progress: bool = True,
) -> BitAllocation:
    """Choose the bits of each layer's weights so that the network loses least under a budget.

    Each layer is quantized alone at each width (:func:`~slimkit.quantize.sensitivity`); losses
    of layers add up, as the power of independent noise does (as in HAWQ-V2, Dong et al., 2020,
    https://arxiv.org/abs/1911.03852). The best choice under the budget is that of a multiple-choice
    knapsack, solved exactly by branch and bound (:func:`scipy.optimize.milp`).

    Args:
        model: any module; it is copied, not changed.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data, as for :func:`~slimkit.quantize.ptq`.
        size: fraction of the quantized weights' bytes to REMOVE, against the target's own bits
            (8): ``0.4`` leaves at most 60 %. Exactly one of ``size`` and ``bops``.
        bops: fraction of the bit operations of the integer layers to remove, likewise.
        bits: widths to choose from, each 2 to 8.
        evaluate: network → metric on validation data, higher is better; without it noise in the
            outputs on the calibration batches is what is lost.
        target: the runtime whose integer operators the scheme must fit.
        granularity: one weight scale per output ``"channel"`` or per ``"tensor"``.
        observer: how ranges of activations are found.
        skip: modules that stay in float; they are not part of the budget.
        batches: use so many calibration batches; all by default.
        file: keeps what was measured of every layer, for another budget or after an interruption.
        progress: show progress on standard error if it takes over ten seconds.

    Returns:
        Module path → bits, for ``weight_bits`` of :func:`~slimkit.quantize.ptq`,
        :func:`~slimkit.quantize.qat` and recipes.

    Raises:
        InputError: not exactly one budget, or an argument is wrong.
        PlanError: the smallest widths remove less than the budget asks for; says how much.
        UnknownNameError, PatternError, DataError, CaptureError, EvaluationError, ArtifactError:
            as for :func:`~slimkit.quantize.sensitivity`.
    """
    name, removed = _budget(size, bops)
    widths = sorted(set(bits))
    if evaluate is not None:
        refuse_test_data(evaluate)
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
    table = measure_sensitivity(
        switches,
        noise_scorer(quantized.model, data) if evaluate is None else metric_scorer(evaluate),
        measure="sqnr" if evaluate is None else "metric",
        units={unit: layers for unit, layers in units_of(switches).items() if unit},
        bits=widths,
        file=file,
        progress=progress,
    )
    costs = _layer_costs(quantized.plan, quantized.model, example_inputs, list(table.layers))
    return _allocated(table, costs, widths, name, removed)


@dataclass(frozen=True)
class _LayerCost:
    """Of one layer: weights, MACs × activation bits, and the weight bits of the target."""

    weights: int
    products: int
    bits: int

    def of(self, budget: str, bits: int) -> int:
        """Bits of its weights, or bit operations."""
        return bits * (self.weights if budget == "size" else self.products)


def _allocated(
    table: LayerSensitivity,
    costs: Mapping[str, _LayerCost],
    widths: Sequence[int],
    budget: str,
    removed: float,
) -> BitAllocation:
    whole = sum(cost.of(budget, cost.bits) for cost in costs.values())
    spent = [[cost.of(budget, width) for width in widths] for cost in costs.values()]
    losses = [[max(0.0, table.damage(name, width)) for width in widths] for name in costs]
    chosen = choose_within(spent, losses, math.floor((1.0 - removed) * whole + 1e-6))
    if chosen is None:
        most = 1.0 - sum(min(item) for item in spent) / whole
        raise PlanError(
            f"{widths[0]} bits everywhere remove {most:.3f}, {removed:g} was asked for",
            where=budget,
            hint="ask for less, or offer fewer bits",
        )
    rows = tuple(
        LayerBits(name, widths[pick], cost.weights, cost.of("bops", widths[pick]), loss[pick])
        for (name, cost), pick, loss in zip(costs.items(), chosen, losses, strict=True)
    )

    def gone(kind: str) -> float:
        left = sum(costs[row.layer].of(kind, row.bits) for row in rows)
        before = sum(cost.of(kind, cost.bits) for cost in costs.values())
        return 1.0 - left / before if before else 0.0

    return BitAllocation(rows, table.measure, gone("size"), gone("bops"))


def _layer_costs(
    plan: QuantPlan, network: nn.Module, example_inputs: ExampleInputs, layers: Sequence[str]
) -> dict[str, _LayerCost]:
    macs = {row.name: row.macs for row in profile(network, example_inputs).layers}
    parameters = named_weights(network)
    specs = {spec.name: spec for spec in plan.quantizers}
    widths = plan.bit_widths()
    weights = dict.fromkeys(layers, 0)
    for decision in plan.decisions:
        spec = specs[decision.weight] if decision.integer and decision.weight else None
        if spec is not None and spec.parameter is not None and decision.module in weights:
            weights[decision.module] = parameters[spec.parameter].numel()
    return {
        layer: _LayerCost(weights[layer], macs.get(layer, 0) * widths[layer][1], widths[layer][0])
        for layer in layers
    }


def _budget(size: float | None, bops: float | None) -> tuple[str, float]:
    given = {name: value for name, value in (("size", size), ("bops", bops)) if value is not None}
    if len(given) != 1:
        raise InputError(
            f"expected exactly one of size and bops, got {' and '.join(given) or 'none'}",
            where="size",
            hint="size=0.4 removes 40 % of the weights' bytes",
        )
    ((name, value),) = given.items()
    numeric: Any = value
    if isinstance(numeric, bool) or not isinstance(numeric, int | float) or not 0 < numeric < 1:
        raise InputError(f"expected a fraction between 0 and 1, got {value!r}", where=name)
    return name, float(value)
