"""Greedy knapsack: layers go back to float within a budget where that helps the outputs most."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slimkit.quantize.layer_choice.layer_ranking import multiply_adds, noise_shares
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.targets import Target

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work

__all__ = ["FloatBudget"]

_EXAMPLES = 16
"""Calibration examples that the two selections are compared on, in one forward each."""
_LONGEST_RUN = 4
"""Consecutive layers that are put back at once: what one writes and the next reads is rounded
until both are in float."""


@dataclass(frozen=True)
class FloatBudget:
    """How much of the network may stay in float.

    Attributes:
        share: of the network's multiply-adds, in (0, 1].
    """

    share: float

    def spend(self, work: Work, *, target: Target) -> None:
        """Put the layers back to float that the budget is spent on best, in place.

        Two selections by the layers' shares in the noise of the outputs are evaluated on
        calibration data, and the better one is kept, if it gains anything: the layers that
        hurt most for what they cost, beginning with a network in float; and those that gain most
        for what they cost, runs of consecutive layers among them, beginning with an integer one.

        Args:
            work: calibrated; what is in float already counts.
            target: that it is quantized for.
        """
        switches = LayerSwitches(work.quantized, target=target)
        macs = multiply_adds(work)
        integer = set(switches.layers)
        spent = sum(count for layer, count in macs.items() if layer not in integer)
        budget = math.floor(self.share * sum(macs.values())) - spent
        costs = {layer: macs.get(layer, 0) for layer in switches.layers}
        if not costs or budget < min(costs.values()):
            return
        noise: dict[tuple[str, ...], float] = {}
        with work.display(4, "float") as display:
            shares = noise_shares(work, switches)
            display.step(1, "noise of every layer")
            distance = OutputDistance(work.reference, work.inputs(_EXAMPLES))
            selections = worst_within(shares, costs, budget), best_within(shares, costs, budget)
            for number, choice in enumerate(((), *selections), start=2):
                if choice not in noise:
                    with switches.set(choice) as network:
                        noise[choice] = distance.noise(network)
                display.step(number, f"{len(choice)} in float: {decibels(noise[choice]):.4g} dB")
        in_float = min(noise, key=lambda choice: _or_worst(noise[choice]))
        reason = f"left in float within {100 * self.share:g} % of the multiply-adds"
        network = switches.leave(in_float, switches.plan(in_float, reason))
        told = (
            f"{', '.join(in_float) or 'no layer'} {reason}: {decibels(noise[in_float]):.4g} dB, "
            f"{decibels(noise[()]):.4g} dB with every layer quantized"
        )
        network.replace_plan(replace(network.plan, warnings=(*network.plan.warnings, told)))


def _or_worst(noise: float) -> float:
    return math.inf if math.isnan(noise) else noise


def worst_within(shares: NoiseShares, costs: Mapping[str, int], budget: int) -> tuple[str, ...]:
    """Layers from the top of :meth:`NoiseShares.worst_first`, without those that are too dear.

    Returns:
        In the order of ``costs``.
    """
    chosen, left = set(), budget
    for layer in shares.worst_first({layer: max(1, cost) for layer, cost in costs.items()}):
        if costs[layer] <= left:
            chosen.add(layer)
            left -= costs[layer]
    return tuple(layer for layer in costs if layer in chosen)


def best_within(shares: NoiseShares, costs: Mapping[str, int], budget: int) -> tuple[str, ...]:
    """Layers, and runs of them, whose quantizers' noise is largest for what they cost, one by one.

    Args:
        shares: who makes the noise.
        costs: of the layers, in order of execution.
        budget: for the sum of their costs.

    Returns:
        In the order of ``costs``.
    """
    readers: dict[str, set[str]] = {}
    for layer, names in shares.needed.items():
        for name in names:
            readers.setdefault(name, set()).add(layer)
    chosen: set[str] = set()
    left = budget

    def gain(run: Collection[str]) -> float:
        """Noise of the quantizers that nobody needs any more."""
        gone = chosen.union(run)
        names = {name for layer in run for name in shares.needed[layer]}
        return math.fsum(shares.noise.get(name, 0.0) for name in names if readers[name] <= gone)

    def worth(run: Collection[str]) -> float:
        return gain(run) / max(1, sum(costs[layer] for layer in run))

    while True:
        runs = [
            run
            for run in _runs([layer for layer in costs if layer in shares.needed], chosen)
            if sum(costs[layer] for layer in run) <= left
        ]
        following = max(runs, key=worth, default=())
        if not following or gain(following) <= 0.0:
            return tuple(layer for layer in costs if layer in chosen)
        chosen.update(following)
        left -= sum(costs[layer] for layer in following)


def _runs(layers: Sequence[str], without: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The layers that are left of one to a few consecutive ones."""
    for length in range(1, _LONGEST_RUN + 1):
        for start in range(len(layers) - length + 1):
            run = tuple(name for name in layers[start : start + length] if name not in without)
            if run:
                yield run
