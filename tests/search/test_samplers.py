from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit.errors import InputError
from slimkit.search import (
    SAMPLERS,
    AnnealingSampler,
    FloatRange,
    GeneticSampler,
    IntRange,
    Trial,
    search,
)

LINE = {"x": FloatRange(0.0, 1.0)}


def history(scores: Sequence[float | None], parameters: Sequence[Any] | None = None) -> list[Trial]:
    points = parameters or [{"x": number / 100} for number in range(len(scores))]
    return [
        Trial(number, 1000 + number, points[number], score, score)
        for number, score in enumerate(scores)
    ]


def test_every_registered_sampler_proposes_from_nothing_and_from_failures() -> None:
    for name in SAMPLERS:
        sampler: Any = SAMPLERS.get(name)
        for past in ([], history([None, None])):
            proposal = sampler.ask(LINE, past, np.random.default_rng(0))
            assert set(proposal) == {"x"}
            assert 0 <= proposal["x"] <= 1


@pytest.mark.parametrize("name", ["tpe", "genetic", "annealing"])
def test_a_sampler_that_learns_beats_random(name: str) -> None:
    space = {f"x{i}": FloatRange(-1.0, 1.0) for i in range(6)}

    def bowl(parameters: Any, candidate: Any) -> float:
        return -sum((value - 0.4) ** 2 for value in parameters.values())

    def mean_of_best(sampler: str) -> float:
        found = [
            search(space, bowl, trials=60, sampler=sampler, seed=seed, progress=False).best.value
            for seed in range(3)
        ]
        return float(np.mean([value for value in found if value is not None]))

    assert mean_of_best(name) > mean_of_best("random")


# --- annealing: T = T0 · decay ⁿ, accepted if better or with probability exp((r − R) / T) ---


def test_annealing_changes_one_parameter_of_the_current_point() -> None:
    space = {name: IntRange(0, 9) for name in "abc"}
    past = history([1.0], [{"a": 1, "b": 2, "c": 3}])
    for seed in range(20):
        proposal = AnnealingSampler().ask(space, past, np.random.default_rng(seed))
        changed = [name for name in space if proposal[name] != past[0].parameters[name]]
        assert len(changed) == 1


def test_annealing_follows_the_formula() -> None:
    sampler = AnnealingSampler(temperature=100.0, decay=0.85, relative=False)
    past = history([1.0, 3.0, 2.0, 2.5, -90.0, 2.9])
    current = past[0]
    for steps, trial in enumerate(past[1:], start=1):
        assert trial.score is not None
        assert current.score is not None
        temperature = 100.0 * 0.85**steps
        chance = math.exp(min(0.0, trial.score - current.score) / temperature)
        if random.Random(trial.seed).random() <= chance:
            current = trial
        assert sampler.current(past[: steps + 1]) is current


def test_a_cold_annealing_only_climbs_and_a_hot_one_goes_anywhere() -> None:
    past = history([0.5, 0.4, None, 0.7, 0.7, 0.1])
    cold, hot = AnnealingSampler(temperature=0.0), AnnealingSampler(temperature=1e9, decay=1.0)
    assert [t and t.number for t in map(cold.current, prefixes(past))] == [0, 0, 0, 3, 4, 4]
    assert [t and t.number for t in map(hot.current, prefixes(past))] == [0, 1, 1, 3, 4, 5]


def prefixes(past: list[Trial]) -> list[list[Trial]]:
    return [past[: n + 1] for n in range(len(past))]


@given(
    scores=st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=1, max_size=12),
    factor=st.sampled_from([2.0**-10, 1.0, 2.0**10]),
)
def test_a_relative_temperature_does_not_depend_on_the_unit_of_the_metric(
    scores: list[float], factor: float
) -> None:
    sampler = AnnealingSampler(temperature=0.5)
    here, there = history(scores), history([factor * score for score in scores])
    first, second = sampler.current(here), sampler.current(there)
    assert first is not None
    assert second is not None
    assert first.number == second.number


# --- genetic ---------------------------------------------------------------------------------


def test_a_child_takes_every_parameter_from_one_of_the_best() -> None:
    space = {name: IntRange(0, 1000) for name in "abcdef"}
    rng = np.random.default_rng(1)
    points = [{name: int(rng.integers(1000)) for name in space} for _ in range(10)]
    past = history([float(n) for n in range(10)], points)  # the best are 6 … 9
    sampler = GeneticSampler(population=4, mutation=0.0)
    for seed in range(30):
        child = sampler.ask(space, past, np.random.default_rng(seed))
        assert all(child[n] in {points[i][n] for i in (6, 7, 8, 9)} for n in space)


def test_children_come_after_as_many_random_points_as_asked_for() -> None:
    space = {name: FloatRange(0.0, 1.0) for name in "ab"}
    past = history([0.0, 1.0], [{"a": 0.9, "b": 0.9}, {"a": 0.3, "b": 0.4}])
    known = {("a", 0.9), ("b", 0.9), ("a", 0.3), ("b", 0.4)}
    for sampler, bred in (
        (GeneticSampler(population=3, mutation=0.0), False),
        (GeneticSampler(population=3, mutation=0.0, random=2), True),
        (GeneticSampler(population=3, mutation=0.0, random=0), True),
    ):
        child = sampler.ask(space, past, np.random.default_rng(0))
        assert (set(child.items()) <= known) == bred
    assert set(GeneticSampler(random=0).ask(space, [], np.random.default_rng(0))) == {"a", "b"}


def test_the_winner_of_a_tournament_among_all_is_the_best() -> None:
    past = history([0.0, 5.0, 5.0, 1.0])
    sampler = GeneticSampler(population=4, tournament=4, crossover=0.0, mutation=0.0)
    child = sampler.ask(LINE, past, np.random.default_rng(0))
    assert child == past[1].parameters  # of two equal ones the older


def test_mutation_changes_about_one_parameter_in_n_and_stays_near() -> None:
    space = {str(n): FloatRange(0.0, 1.0) for n in range(10)}
    point = dict.fromkeys(space, 0.5)
    sampler = GeneticSampler(population=2, width=0.1)
    past = history([1.0, 1.0], [point, point])
    changed = []
    for seed in range(200):
        child = sampler.ask(space, past, np.random.default_rng(seed))
        changed.append(sum(value != 0.5 for value in child.values()))
        assert all(0.4 <= float(str(value)) <= 0.6 for value in child.values())
    assert 0.7 < np.mean(changed) < 1.3


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GeneticSampler(population=1), "population"),
        (lambda: GeneticSampler(mutation=1.5), "mutation"),
        (lambda: AnnealingSampler(temperature=-1.0), "temperature"),
        (lambda: AnnealingSampler(decay=float("nan")), "decay"),
    ],
)
def test_a_setting_out_of_range_is_named(make: Any, name: str) -> None:
    with pytest.raises(InputError, match=name):
        make()
