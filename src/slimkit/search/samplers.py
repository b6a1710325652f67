"""Samplers: what is tried next.

A sampler is any object with ``ask(space, history, rng)``. It must be a function of these three
alone: the history is what was recorded, the generator is seeded from (seed, number of the
trial). So it needs no state of its own, and a search that was killed goes on with the same
proposals as one that was not. Register one by name::

    @SAMPLERS.register("corner")
    class Corner:
        def ask(self, space, history, rng):
            return {name: parameter.low for name, parameter in space.items()}
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.registry import Registry
from slimkit.search.parameters import Parameters, SearchSpace, Value, random_parameters

if TYPE_CHECKING:
    import numpy as np

    from slimkit.search.values import Trial

__all__ = [
    "SAMPLERS",
    "AnnealingSampler",
    "GeneticSampler",
    "RandomSampler",
    "Sampler",
    "TPESampler",
]


class Sampler(Protocol):
    """(space, history, rng) → the next point."""

    def ask(
        self, space: SearchSpace, history: Sequence[Trial], rng: np.random.Generator
    ) -> Parameters:
        """Propose one value for every parameter of ``space``.

        Args:
            space: name → parameter.
            history: trials so far, in order; ``score`` (higher is better) is None where the
                evaluation failed.
            rng: the only source of randomness; a proposal that is turned down is followed by
                another call with the same generator, moved on.
        """


SAMPLERS: Registry[Sampler | type[Sampler]] = Registry("sampler")
"""Name → sampler, or a class whose defaults are meant."""


@dataclass(frozen=True)
class RandomSampler:
    """Random search: every point equally likely. What any other sampler must beat."""

    def ask(
        self, space: SearchSpace, history: Sequence[Trial], rng: np.random.Generator
    ) -> dict[str, Value]:
        """A point that does not depend on the history."""
        return random_parameters(space, rng)


@door
@dataclass(frozen=True)
class TPESampler:
    """Tree-structured Parzen estimator of Optuna (Bergstra et al. 2011, section 4).

    The history is replayed into a study in memory, which is then asked; two versions of
    Optuna may propose different points.

    Attributes:
        startup: random trials before the estimator has enough to go by.
        candidates: points drawn per proposal, of which the most promising is taken.
    """

    startup: int = 10
    candidates: int = 24

    def ask(
        self, space: SearchSpace, history: Sequence[Trial], rng: np.random.Generator
    ) -> dict[str, Value]:
        """Ask Optuna."""
        import optuna
        from optuna.trial import TrialState, create_trial

        from slimkit.search.storage import quiet_optuna

        distributions = {name: parameter.distribution() for name, parameter in space.items()}
        with quiet_optuna():
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.startup,
                n_ei_candidates=self.candidates,
                seed=int(rng.integers(2**32)),
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            study.add_trials(
                create_trial(
                    params=dict(trial.parameters),
                    distributions=distributions,
                    value=trial.score,
                    state=TrialState.FAIL if trial.score is None else TrialState.COMPLETE,
                )
                for trial in history
            )
            return dict(study.ask(distributions).params)


@door
@dataclass(frozen=True)
class GeneticSampler:
    """Steady-state genetic algorithm: one member is replaced at a time.

    The population is the best ``population`` trials so far. Two parents are chosen by
    tournament (Goldberg and Deb 1991); a child takes each parameter from one of them, and
    each is then changed with probability ``mutation``.

    Attributes:
        population: members.
        tournament: members drawn per parent, of which the best wins.
        crossover: probability that a child has two parents rather than one.
        mutation: probability that a parameter changes; None for one per child on average.
        width: how far a change goes at most, as part of the parameter's range.
        random: trials before the first child, random where the search is given no points to
            start from; None for a whole population. A search that starts from good points
            needs hardly any.
    """

    population: int = 20
    tournament: int = 3
    crossover: float = 0.9
    mutation: float | None = None
    width: float = 1.0
    random: int | None = None

    def __post_init__(self) -> None:
        _check_at_least("population", self.population, 2)
        _check_at_least("tournament", self.tournament, 1)
        _check_part("crossover", self.crossover)
        _check_part("width", self.width)
        if self.mutation is not None:
            _check_part("mutation", self.mutation)
        if self.random is not None:
            _check_at_least("random", self.random, 0)

    def ask(
        self, space: SearchSpace, history: Sequence[Trial], rng: np.random.Generator
    ) -> dict[str, Value]:
        """A random point at first, then a child of the best."""
        finished = [trial for trial in history if trial.score is not None]
        if len(finished) < max(1, self.population if self.random is None else self.random):
            return random_parameters(space, rng)
        finished.sort(key=lambda trial: (-(trial.score or 0.0), trial.number))
        members = finished[: self.population]
        one = self._parent(members, rng)
        other = self._parent(members, rng) if rng.random() < self.crossover else one
        chance = 1.0 / len(space) if self.mutation is None else self.mutation
        child: dict[str, Value] = {}
        for name, parameter in space.items():
            value = (one if rng.random() < 0.5 else other)[name]
            if rng.random() < chance:
                value = parameter.neighbour(value, rng, self.width)
            child[name] = value
        return child

    def _parent(self, members: Sequence[Trial], rng: np.random.Generator) -> Parameters:
        """The best of a few; ``members`` are sorted, the best first."""
        drawn = rng.choice(len(members), size=min(self.tournament, len(members)), replace=False)
        return members[int(drawn.min())].parameters


@door
@dataclass(frozen=True)
class AnnealingSampler:
    """Simulated annealing as in PaddleSlim's controller.

    Each proposal changes one parameter of the current point. With score r it becomes the
    current point if it is better, or with probability exp((r − R) / T), where R is the score
    of the current point and T = ``temperature`` · ``decay`` ⁿ after n trials (Kirkpatrick et
    al. 1983). The current point is found by replaying the history.

    PaddleSlim starts at 100 whatever the metric; for an accuracy between 0 and 1 the first 40
    or so trials are then a random walk. Here the temperature counts in units of the range
    of scores so far, unless ``relative`` is off.

    Attributes:
        temperature: at the start, at least 0.
        decay: factor per trial, 0 … 1.
        relative: the temperature is multiplied by (best − worst score so far).
        width: how far a change goes at most, as part of the parameter's range; 1 for anywhere.
    """

    temperature: float = 0.1
    decay: float = 0.85
    relative: bool = True
    width: float = 1.0

    def __post_init__(self) -> None:
        _check_at_least("temperature", self.temperature, 0)
        _check_part("decay", self.decay)
        _check_part("width", self.width)

    def ask(
        self, space: SearchSpace, history: Sequence[Trial], rng: np.random.Generator
    ) -> dict[str, Value]:
        """A random point at first, then a neighbour of the current one."""
        current = self.current(history)
        if current is None:
            return random_parameters(space, rng)
        name = list(space)[int(rng.integers(len(space)))]
        moved = space[name].neighbour(current.parameters[name], rng, self.width)
        return {**current.parameters, name: moved}

    def current(self, history: Sequence[Trial]) -> Trial | None:
        """The point that a history has led to; None if no evaluation succeeded yet."""
        state: Trial | None = None
        here = lowest = highest = 0.0
        steps = 0
        for trial in history:
            if trial.score is None:
                continue
            if state is None:
                state, here = trial, trial.score
                lowest = highest = here
                continue
            lowest, highest = min(lowest, trial.score), max(highest, trial.score)
            steps += 1
            scale = highest - lowest if self.relative else 1.0
            temperature = scale * self.temperature * self.decay**steps
            if trial.score >= here or _accepts(trial.score - here, temperature, trial.seed):
                state, here = trial, trial.score
        return state


def _accepts(change: float, temperature: float, seed: int) -> bool:
    """Metropolis criterion: a worse point is taken with probability exp(change / temperature).

    The random number comes from the trial's seed: always the same answer for the same trial.
    """
    if temperature <= 0.0:
        return False
    return random.Random(seed).random() <= math.exp(change / temperature)


def _check_at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InputError(f"expected at least {least:g}, got {value!r}", where=name)


def _check_part(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise InputError(f"expected a number between 0 and 1, got {value!r}", where=name)


SAMPLERS.register("random")(RandomSampler())
SAMPLERS.register("tpe")(TPESampler())
SAMPLERS.register("genetic")(GeneticSampler())
SAMPLERS.register("annealing")(AnnealingSampler())
