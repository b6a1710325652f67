"""Quantization within a limit: the most damaging layers stay in float until it is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from slimkit.artifact import PathLike
from slimkit.limits import MOST_DB, Fewest, Limit
from slimkit.modules import Evaluate, copy_module
from slimkit.progress import ProgressDisplay
from slimkit.quantize.evaluating import EvaluationError, evaluated
from slimkit.quantize.layer_choice.layer_ranking import multiply_adds, noise_shares
from slimkit.quantize.layer_choice.layer_switches import LayerSwitches, float_parameters
from slimkit.quantize.layer_choice.noise_estimate import NoiseShares
from slimkit.quantize.outputs.distance import OutputDistance, decibels
from slimkit.quantize.planning.partial_plans import integer_layers
from slimkit.quantize.targets import Target

if TYPE_CHECKING:
    from slimkit.quantize.methods.interface import Work
    from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["AccuracyLimit", "Repair", "accuracy_limit"]

_HOPELESS = 2.0
"""Estimated noise of a layer, in units of what the limit leaves, above which making it integer
again is not tried: estimates are rarely off by more than a factor of two."""
_ROUNDS = 6
"""Choices of layers that are repaired, with the limit for the choice corrected in between, until it
holds after the repair; the time of the methods is spent as often at most."""


@dataclass(frozen=True)
class Repair:
    """Methods that adjust integer layers to their rounding, to be run again.

    Attributes:
        plain: the calibrated network before any of them ran.
        run: runs them on a network, in place.
    """

    plain: QuantizedModel
    run: Callable[[QuantizedModel], None]


@dataclass(frozen=True)
class AccuracyLimit:
    """How much quantization may cost: of a metric, or of the outputs' distance from the noise.

    Attributes:
        max_drop: in the unit of the metric, at least 0.
        base: metric of the float network; without a metric the dB that the outputs must reach.
        evaluate: the metric, higher is better; None compares outputs with those of the float
            network, on the calibration batches.
        file: where the sensitivity of the layers is kept; None keeps it nowhere.
        fewest: what is left in float as little as possible: ``"layers"``, or ``"macs"``, the
            multiply-adds that the network spends in them.
    """

    max_drop: float
    base: float
    evaluate: Evaluate | None = None
    file: PathLike | None = None
    fewest: Fewest = "layers"

    @property
    def subject(self) -> str:
        """What is kept."""
        return "the outputs" if self.evaluate is None else "the metric"

    @property
    def bound(self) -> str:
        """Where it is kept."""
        return f"at {self.base:g} dB" if self.evaluate is None else f"within {self.max_drop:g}"

    @property
    def reason(self) -> str:
        """Why a layer is in float."""
        return f"left in float to keep {self.subject} {self.bound}"

    def outcome(self, drop: float, whole: float) -> str:
        """What was reached, and what there was with every layer quantized."""
        if self.evaluate is None:
            return (
                f"{self.base - drop:.4g} dB, {self.base - whole:.4g} dB with every layer quantized"
            )
        return (
            f"it falls by {drop:.4g} from {self.base:.6g}, and by {whole:.4g} "
            "with every layer quantized"
        )

    def score(self, work: Work) -> Evaluate:
        """What candidates are judged by; higher is better."""
        if self.evaluate is not None:
            return self.evaluate
        distance = OutputDistance(work.reference, work.inputs())
        return lambda model: max(-MOST_DB, min(decibels(distance.noise(model)), MOST_DB))

    def remembered(self, work: Work) -> dict[str, Tensor]:
        """Parameters of the integer layers and the float outputs, before methods adjust them."""
        _ = work.reference  # a copy is made when it is first asked for
        return float_parameters(work.quantized)

    def keep(
        self,
        work: Work,
        *,
        target: Target,
        originals: Mapping[str, Tensor],
        repair: Repair | None = None,
    ) -> QuantizedModel:
        """Put as few layers, or multiply-adds, back to float as it takes.

        Layers are ranked by the noise that they make in the outputs, on the first calibration
        batches, per multiply-add where these count. The smallest number of them, from the top,
        that meets the limit is found by doubling and bisection, for a limit of noise near the
        number that should meet it; then those that turn out not to be needed become integer again,
        the dearest first, but for those that make far more noise than the limit leaves. Every
        candidate is evaluated for real.

        Methods adjust a layer to the errors of those before it, which it has no more where these
        are in float. With ``repair`` layers are therefore chosen before the methods run, by a limit
        that is lower by what the methods gained on the whole network, and higher by what is missing
        after they ran, a few times over.

        Args:
            work: what is quantized, in every layer.
            target: that it is quantized for.
            originals: parameters that methods adjusted to the rounding, as they were before.
            repair: of a limit of noise; the methods ran on ``work.quantized``.

        Returns:
            ``work.quantized``, or what was repaired again; its plan says what was left in float
            and why.

        Raises:
            EvaluationError: its ``model`` is ``work.quantized`` with every layer integer.
        """
        switches = LayerSwitches(work.quantized, target=target, originals=originals)
        trials = _Trials(self, self.score(work), switches)
        most = len(switches.layers) + 2
        try:
            with work.display(most, "accuracy") as show:
                trials.show = show
                if not switches.layers or trials.meets(()):
                    return work.quantized
                if repair is not None:
                    return self._repaired(work, trials, repair, target)
                costs = self._costs(work, switches)
                found = _fewest(trials, noise_shares(work, switches, file=self.file), costs)
        except EvaluationError as error:
            error.model = work.quantized
            raise
        in_float = trials.best if found is None else found
        network = switches.leave(in_float, switches.plan(in_float, self.reason))
        drop, whole = trials.drops[frozenset(in_float)], trials.drops[frozenset()]
        self._tell(network, in_float, drop, whole, reached=found is not None)
        return network

    def _repaired(
        self, work: Work, trials: _Trials, repair: Repair, target: Target
    ) -> QuantizedModel:
        """Choose layers on the plain network, and repair what is left; see :meth:`keep`."""
        whole = trials.drops[frozenset()]
        switches = LayerSwitches(repair.plain, target=target)
        plain = _Trials(self, trials.score, switches, show=trials.show)
        plain.meets(())
        costs, shares = self._costs(work, switches), noise_shares(work, switches, file=self.file)
        allowed = max(0.0, plain.drops[frozenset()] - whole)
        best: tuple[float, QuantizedModel, tuple[str, ...]] | None = None
        for rounds_left in reversed(range(_ROUNDS)):
            plain.limit = replace(self, max_drop=allowed)
            found = _fewest(plain, shares, costs)
            in_float = plain.best if found is None else found
            network = copy_module(repair.plain)
            same = LayerSwitches(network, target=target)
            repair.run(same.leave(in_float, same.plan(in_float, self.reason)))
            drop = self.base - evaluated(trials.score, network, "the repaired network")
            if best is None or drop < best[0]:
                best = drop, network, in_float
            missing = drop - self.max_drop
            if missing <= 0 or allowed == 0.0:
                break
            without = plain.drops[frozenset(in_float)]  # less than that is another choice
            allowed = max(0.0, min(allowed - missing, 0.99 * without)) if rounds_left > 1 else 0.0
        without = plain.drops[frozenset(in_float)]
        if best is None or (best[0] > self.max_drop and without < best[0]):  # methods may do harm
            network = switches.leave(in_float, switches.plan(in_float, self.reason))
            best = without, network, in_float
        drop, network, in_float = best
        self._tell(network, in_float, drop, whole, reached=drop <= self.max_drop)
        return network

    def _costs(self, work: Work, switches: LayerSwitches) -> dict[str, int]:
        """What each layer costs in float, in the unit of :attr:`fewest`."""
        if self.fewest == "layers":
            return dict.fromkeys(switches.layers, 1)
        macs = multiply_adds(work)
        return {layer: max(1, macs.get(layer, 0)) for layer in switches.layers}

    def _tell(
        self,
        network: QuantizedModel,
        in_float: Sequence[str],
        drop: float,
        whole: float,
        *,
        reached: bool,
    ) -> None:
        """Say in the plan what was left in float, and aloud if the limit asks too much."""
        names = ", ".join(in_float) or "no layer"
        outcome = self.outcome(drop, whole)
        if reached:
            told = f"{names} {self.reason}: {outcome}"
        else:
            told = (
                f"{self.subject} cannot be kept {self.bound}, not even in float: "
                f"with {names} in float {outcome}"
            )
        nothing_left = not integer_layers(network.plan)
        if reached and nothing_left:
            told += "; no layer is left to quantize"
        if not reached or nothing_left:
            warnings.warn(told, stacklevel=4)
        plan = network.plan
        network.replace_plan(replace(plan, warnings=(*plan.warnings, told)))


def accuracy_limit(limit: Limit, model: QuantizedModel) -> AccuracyLimit | None:
    """The goal that ``limit`` sets, with the metric of the float network.

    Returns:
        None for a budget.

    Raises:
        EvaluationError: ``evaluate`` failed on the float network.
    """
    if limit.min_sqnr is not None:
        lowest = float(limit.min_sqnr)
        return AccuracyLimit(0.0, lowest, file=limit.sensitivity, fewest=limit.fewest)
    if limit.max_drop is None or limit.evaluate is None:
        return None
    base = evaluated(limit.evaluate, model.model, "the float network")
    most = float(limit.max_drop)
    return AccuracyLimit(most, base, limit.evaluate, limit.sensitivity, limit.fewest)


@dataclass
class _Trials:
    """Candidates that were evaluated: layers in float → fall of the metric."""

    limit: AccuracyLimit
    score: Evaluate
    switches: LayerSwitches
    drops: dict[frozenset[str], float] = field(default_factory=dict)
    tried: list[tuple[str, ...]] = field(default_factory=list)
    show: ProgressDisplay | None = None

    def meets(self, in_float: Sequence[str]) -> bool:
        """Whether the limit holds with these layers in float; evaluated once."""
        key = frozenset(in_float)
        if key not in self.drops:
            number = len(in_float)
            what = (
                f"{number} layer{'' if number == 1 else 's'} in float" if number else "all integer"
            )
            with self.switches.set(in_float) as network:
                value = evaluated(self.score, network, what)
            self.drops[key] = self.limit.base - value
            self.tried.append(tuple(in_float))
            if self.show is not None:
                self.show.step(len(self.tried), f"{what}: {value:.5g}")
        return self.drops[key] <= self.limit.max_drop

    def hopeless(self, layer: str, in_float: Sequence[str], shares: NoiseShares) -> bool:
        """Whether ``layer`` makes far more noise than the limit leaves with ``in_float``."""
        if self.limit.evaluate is not None:  # a metric says nothing about noise
            return False
        integer = [other for other in shares.needed if other not in in_float]
        added = self._scale(in_float, shares) * shares.added(layer, integer)
        return added > _HOPELESS * (self._allowed - self._made(in_float))

    def likely(self, ranked: Sequence[str], count: int, shares: NoiseShares) -> int:
        """How many layers from the top must go back to float, judged by the first ``count``.

        A metric says nothing about noise: twice as many.
        """
        if self.limit.evaluate is not None:
            return max(1, 2 * count)
        scale = self._scale(ranked[:count], shares)
        enough = (n for n in range(1, len(ranked)) if self._suffices(ranked[n:], scale, shares))
        return next(enough, len(ranked))

    def _suffices(self, integer: Sequence[str], scale: float, shares: NoiseShares) -> bool:
        return scale * shares.of(integer) <= self._allowed

    @property
    def _allowed(self) -> float:
        """Noise / signal that the limit allows."""
        return math.pow(10.0, -(self.limit.base - self.limit.max_drop) / 10.0)

    def _made(self, in_float: Sequence[str]) -> float:
        """Noise / signal with these layers in float."""
        return math.pow(10.0, -(self.limit.base - self.drops[frozenset(in_float)]) / 10.0)

    def _scale(self, in_float: Sequence[str], shares: NoiseShares) -> float:
        """Noise that was found, of noise that the shares add up to: large noise saturates."""
        expected = shares.of(other for other in shares.needed if other not in in_float)
        return self._made(in_float) / expected if expected > 0 else 1.0

    @property
    def best(self) -> tuple[str, ...]:
        """The candidate that lost least; of several the one with the fewest layers in float."""
        return min(self.tried, key=lambda layers: (self.drops[frozenset(layers)], len(layers)))


def _fewest(
    trials: _Trials, shares: NoiseShares, costs: Mapping[str, int]
) -> tuple[str, ...] | None:
    """Layers to leave in float so that the limit holds; None if that is out of reach.

    The whole network is known not to meet it.
    """
    ranked = shares.worst_first(costs)
    fails, count = 0, trials.likely(ranked, 0, shares)
    while count < len(ranked) and not trials.meets(ranked[:count]):
        likely = trials.likely(ranked, count, shares)
        fails, count = count, min(max(count + 1, likely), len(ranked))
    if not trials.meets(ranked[:count]):
        return None
    following = trials.likely(ranked, count, shares)
    while count - fails > 1:
        fewer = max(fails + 1, min(following, count - 1))
        if trials.meets(ranked[:fewer]):
            count = fewer
        else:
            fails = fewer
        following = (count + fails) // 2
    needed = list(ranked[:count])
    last_first = reversed(ranked[: count - 1])  # the very last one is known to be needed
    for layer in sorted(last_first, key=lambda layer: -costs[layer]):
        if trials.hopeless(layer, needed, shares):
            continue
        others = [other for other in needed if other != layer]
        if trials.meets(others):
            needed = others
    return tuple(needed)
