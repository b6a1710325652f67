"""Allocations found by evolution: on target, reproducible, never worse than uniform."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.errors import InputError, PlanError, UnknownNameError
from slimkit.prune.allocation.evolution import Annealing, Genetic, evolve
from slimkit.prune.targets import RemovalTarget

IMAGE = torch.zeros(1, 3, 8, 8)
HALF = RemovalTarget("macs", 0.5)
BOTH = [
    pytest.param(Annealing(trials=12), id="annealing"),
    pytest.param(Genetic(trials=12, population=4), id="genetic"),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 4, 1),
    )


def widths(model):
    return [layer.out_channels for layer in model if isinstance(layer, nn.Conv2d)][:3]


def score(model):
    """The first layer matters, the last hardly."""
    first, second, third = widths(model)
    return first / 16 + 0.3 * second / 16 + 0.05 * third / 24


def macs(model):
    return sk.profile(model, IMAGE).macs


def space_of(evaluate=score, **options):
    return sk.prune.space(network(), IMAGE, round_to=1, evaluate=evaluate, **options)


def searched(space, target=HALF, sampler="genetic", **options):
    return evolve(space, target, sampler, **{"trials": 8, "progress": False, **options})


def found(evolution):
    return [(t.parameters, t.seed, t.value, t.error) for t in evolution.result.trials]


@pytest.mark.parametrize("allocation", BOTH)
def test_the_plan_is_the_best_network_that_was_evaluated(allocation):
    seen = {}

    def evaluate(model):
        seen[tuple(widths(model))] = score(model)
        assert macs(model) <= 0.5 * macs(network())
        return score(model)

    plan = sk.prune.plan(
        network(),
        IMAGE,
        macs=0.5,
        round_to=1,
        allocation=allocation,
        evaluate=evaluate,
        progress=False,
    )
    uniform = sk.prune.plan(network(), IMAGE, macs=0.5, round_to=1)
    first = tuple(widths(sk.apply(network(), uniform)))
    assert next(iter(seen)) == first
    assert len(seen) == 12  # none twice
    best = tuple(widths(sk.apply(network(), plan)))
    assert seen[best] == max(seen.values())
    assert seen[best] > seen[first]


@pytest.mark.parametrize("allocation", BOTH)
def test_where_nothing_is_better_uniform_stays(allocation):
    uniform = sk.prune.plan(network(), IMAGE, params=0.4, round_to=1)
    goal = widths(sk.apply(network(), uniform))
    plan = sk.prune.plan(
        network(),
        IMAGE,
        params=0.4,
        round_to=1,
        allocation=allocation,
        evaluate=lambda model: 1.0 if widths(model) == goal else 0.0,
        progress=False,
    )
    assert widths(sk.apply(network(), plan)) == goal


def test_a_ratio_is_divided_but_not_exceeded():
    space = space_of()
    target = RemovalTarget("ratio", 0.25)
    evolution = searched(space, target, trials=12)
    assert evolution.result.best.value > evolution.result.trials[0].value
    assert sum(evolution.kept.values()) == 0.75 * (16 + 16 + 24)
    assert space.fit(evolution.proposal, target) == evolution.kept


def test_allocations_to_start_from_come_after_uniform():
    space = space_of()

    def mine(space, target):
        return lambda fraction: {
            g.name: g.size * (1 - fraction * (g.name == "6")) for g in space.groups
        }

    start = ["global", mine]
    evolution = searched(space, RemovalTarget("macs", 0.2), start=start)
    kept = space.fit(mine(space, None), RemovalTarget("macs", 0.2))
    assert kept["0"] == 16
    third = evolution.result.trials[2].parameters
    assert third == {
        name: 1 - kept[name] / size for name, size in (("0", 16), ("3", 16), ("6", 24))
    }
    assert evolution.result.best.value >= max(t.value for t in evolution.result.trials[:3])
    with pytest.raises(UnknownNameError, match="start: unknown allocation"):
        searched(space, start="gobal")


@pytest.mark.parametrize("sampler", ["genetic", "annealing"])
def test_a_search_that_was_interrupted_goes_on_with_the_same_networks(tmp_path, sampler):
    calls = []

    def interrupted(model):
        calls.append(widths(model))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return score(model)

    options = {"sampler": sampler, "storage": tmp_path / "trials.log", "seed": 7}
    with pytest.raises(KeyboardInterrupt):
        searched(space_of(interrupted), **options)
    resumed = searched(space_of(), **options)
    whole = searched(space_of(), **{**options, "storage": None})
    assert found(resumed) == found(whole)
    assert resumed.kept == whole.kept
    assert found(whole) != found(searched(space_of(), **{**options, "storage": None, "seed": 8}))


def test_the_journal_of_another_search_is_refused(tmp_path):
    file = tmp_path / "trials.log"
    searched(space_of(), storage=file, trials=1)
    other = network()
    with torch.no_grad():
        other[3].weight[0] = 0
    with pytest.raises(InputError, match=r"identity\.weights\.3\.weight is"):
        searched(sk.prune.space(other, IMAGE, round_to=1, evaluate=score), storage=file, trials=1)
    with pytest.raises(InputError, match=r'"macs=0\.5" in the file and "macs=0\.4" here'):
        searched(space_of(), RemovalTarget("macs", 0.4), storage=file, trials=1)


def test_recovery_comes_before_every_evaluation():
    recovered = []

    def recover(model):
        model.train()
        with torch.no_grad():
            model[1].running_mean.fill_(5.0)
        recovered.append(model)

    def evaluate(model):
        assert model is recovered[-1]
        assert not model.training
        assert bool((model[1].running_mean == 5.0).all())
        return score(model)

    space = space_of(evaluate)
    evolution = searched(space, recover=recover)
    assert len(evolution.result.finished) == len(recovered) == 8
    assert not bool((space.model[1].running_mean == 5.0).any())


def test_failed_evaluations_are_survived_up_to_a_number():
    calls = []

    def shaky(model):
        calls.append(model)
        return float("nan") if len(calls) in {2, 3} else score(model)

    evolution = searched(space_of(shaky), max_failures=2)
    assert [t.number for t in evolution.result.trials if t.error] == [1, 2]
    calls.clear()
    with pytest.raises(PlanError, match="evaluate: 2 of 3 evaluations failed"):
        searched(space_of(shaky), max_failures=1)


def test_a_latency_target_is_searched_at_equal_macs_and_left_to_be_measured():
    evolution = searched(space_of(), RemovalTarget("latency", 0.5))
    assert found(evolution) == found(searched(space_of()))
    first, last = evolution.proposal(0.1), evolution.proposal(0.6)
    assert all(last[name] <= first[name] for name in first)
    assert sum(first.values()) == pytest.approx(0.9 * 56)
    assert sum(last.values()) == pytest.approx(0.4 * 56)


def test_an_evaluation_is_needed():
    with pytest.raises(InputError, match="evaluate: networks are compared with it"):
        sk.prune.plan(network(), IMAGE, macs=0.5, round_to=1, allocation=Annealing())


def test_a_target_out_of_reach_is_said_before_anything_is_evaluated():
    with pytest.raises(PlanError, match="out of reach"):
        searched(space_of(lambda model: pytest.fail("evaluated")), RemovalTarget("macs", 0.999))
