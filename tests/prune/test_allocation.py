"""How many channels each group keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slimkit as sk
from slimkit.graph.groups import Group
from slimkit.prune.allocation.ranking import ALLOCATIONS, GlobalRanking
from slimkit.prune.criteria.scores import CRITERIA, scored
from slimkit.prune.fitting import allowed_counts, fit_counts, rounded
from slimkit.prune.targets import RemovalTarget

HALF = RemovalTarget("ratio", 0.5)


def groups_of(**sizes):
    return [Group(name, size, ()) for name, size in sizes.items()]


def proposed(allocation, groups, scores, fraction):
    return allocation(SimpleNamespace(groups=groups, scores=scores), HALF)(fraction)


def test_uniform_takes_the_same_fraction_everywhere():
    groups = groups_of(a=10, b=40)
    assert proposed(ALLOCATIONS.get("uniform"), groups, {}, 0.3) == {"a": 7.0, "b": 28.0}


def test_global_takes_the_lowest_scores_of_all_groups():
    groups = groups_of(a=4, b=4)
    scores = {"a": torch.tensor([1.0, 1, 1, 1]), "b": torch.tensor([0.1, 0.1, 1.9, 1.9])}
    assert proposed(GlobalRanking(), groups, scores, 0.25) == {"a": 4, "b": 2}


def test_global_does_not_see_the_scale_of_a_group():
    groups = groups_of(a=4, b=4)
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([1000.0, 2000, 3000, 4000])}
    assert proposed(GlobalRanking(), groups, scores, 0.5) == {"a": 2, "b": 2}
    assert proposed(GlobalRanking(relative=False), groups, scores, 0.5) == {"a": 1, "b": 3}


def test_global_never_takes_more_than_its_bound_from_a_group():
    groups = groups_of(a=10, b=10)
    scores = {"a": torch.cat([torch.full((9,), 1e-6), torch.ones(1)]), "b": torch.ones(10)}
    assert proposed(GlobalRanking(max_fraction=0.6), groups, scores, 0.4)["a"] == 4


@pytest.mark.parametrize(
    ("size", "width", "round_to", "least", "counts"),
    [
        (64, 1, 8, 8, [8, 16, 24, 32, 40, 48, 56, 64]),
        (16, 1, 8, 8, [8, 16]),
        (20, 1, 8, 8, [8, 16, 20]),
        (12, 1, 8, 8, [8, 12]),
        (8, 1, 8, 8, [8]),
        (5, 1, 8, 8, [5]),
        (6, 1, 1, 1, [1, 2, 3, 4, 5, 6]),
        (6, 1, 1, 4, [4, 5, 6]),
        (8, 6, 8, 8, [4, 8]),  # six groups at once: 24 or 48 layer channels
        (8, 8, 8, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_counts_are_multiples_of_the_step_or_everything(size, width, round_to, least, counts):
    assert allowed_counts(size, [width], round_to=round_to, min_channels=least) == counts


def test_rounding_goes_to_the_nearest_and_up_on_a_tie():
    assert rounded(44.8, [40, 48, 56]) == 48
    assert rounded(44.0, [40, 48, 56]) == 48
    assert rounded(43.9, [40, 48, 56]) == 40


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(9, 80), min_size=1, max_size=6),
    removed=st.floats(0.05, 0.8),
    weights=st.lists(st.floats(0.5, 20), min_size=6, max_size=6),
)
def test_a_fit_meets_its_limit_and_no_group_could_have_kept_more(sizes, removed, weights):
    allowed = {
        f"g{i}": allowed_counts(size, [1], round_to=8, min_channels=8)
        for i, size in enumerate(sizes)
    }
    groups = [Group(f"g{i}", size, ()) for i, size in enumerate(sizes)]
    price = dict(zip(allowed, weights, strict=False))

    def cost(kept):
        return sum(price[n] * kept.get(n, g.size) for n, g in zip(allowed, groups, strict=True))

    limit = (1 - removed) * cost({})
    uniform = ALLOCATIONS.get("uniform")
    kept = fit_counts(
        lambda f: proposed(uniform, groups, {}, f),
        allowed,
        cost,
        lambda name, a, b: float(b - a),
        limit,
    )
    least = cost({name: counts[0] for name, counts in allowed.items()})
    if kept is None:
        assert least > limit
        return
    assert cost(kept) <= limit
    for name, counts in allowed.items():
        assert kept[name] in counts
        for more in counts[counts.index(kept[name]) + 1 :][:1]:
            assert cost({**kept, name: more}) > limit


def test_a_bounded_allocation_still_reaches_what_rounding_allows():
    """Global ranking leaves at least 10 % of a group; the target asks for all that is possible."""
    groups = groups_of(a=100, b=100)
    allowed = {name: allowed_counts(100, [1], round_to=1, min_channels=1) for name in "ab"}
    scores = {"a": torch.rand(100), "b": torch.rand(100)}
    kept = fit_counts(
        lambda f: proposed(GlobalRanking(), groups, scores, f),
        allowed,
        lambda kept: float(sum(kept.get(n, 100) for n in "ab")),
        lambda name, a, b: float(b - a),
        10.0,
    )
    assert sum(kept.values()) == 10


def stack(width=64, depth=4):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(depth)]
    return nn.Sequential(*layers, nn.Conv2d(width, 10, 1)).eval()


@pytest.mark.parametrize("shift", [0.0, 1e-17, -1e-17])
def test_a_ranking_of_scores_with_mean_zero_does_not_hang_on_rounding(shift):
    model, x = stack(), torch.randn(1, 3, 8, 8)

    def centred(group, tensors):
        scores = scored(CRITERIA.get("l2"), group, tensors)
        return (scores - scores.mean()) / scores.std(correction=0) + shift

    plan = sk.prune.plan(
        model, x, ratio=0.5, round_to=1, criterion=centred, allocation=GlobalRanking()
    )
    # By hand: channels of all layers, each layer on the scale of its own magnitudes.
    norms = [layer.weight.detach().flatten(1).norm(dim=1).double() for layer in model[:4]]
    centres = [(n - n.mean()) / (n - n.mean()).abs().mean() for n in norms]
    limit = torch.cat(centres).median()
    expected = [int((c > limit).sum()) for c in centres]
    assert [plan.kept[str(i)][0] for i in range(4)] == expected
    named = sk.prune.plan(
        model,
        x,
        ratio=0.5,
        round_to=1,
        criterion=sk.prune.Normalised("l2", "gaussian"),
        allocation="global",
    )
    assert named.edits == plan.edits


def test_scores_that_are_equal_but_for_rounding_have_no_deviation():
    group = type("G", (), {"name": "g", "size": 3})()
    criterion = sk.prune.Normalised(lambda _g, _t: torch.full((3,), 0.1).double().cumsum(0), "std")
    assert criterion(group, {}).std() > 0
    third = torch.tensor([0.1, 0.1, 0.1 + 1e-17 + 2e-17], dtype=torch.float64)
    for by, value in (("gaussian", 0.0), ("std", 1.0)):
        scores = sk.prune.Normalised(lambda _g, _t: third, by)(group, {})
        assert scores.tolist() == pytest.approx([value] * 3)
        assert scores.unique().numel() == 1


@pytest.mark.parametrize("allocation", ["global", "isomorphic", "uniform"])
def test_a_ratio_beyond_the_bound_of_an_allocation_is_reached_or_said_to_be_out_of_reach(
    allocation,
):
    model, x = stack(), torch.randn(1, 3, 8, 8)
    plan = sk.prune.plan(model, x, ratio=0.95, allocation=allocation, round_to=1)
    gone = 1 - sum(plan.kept[str(i)][0] for i in range(4)) / 256
    assert gone == pytest.approx(0.95, abs=0.01)
    assert plan.warnings == ()
    plan = sk.prune.plan(model, x, ratio=0.95, allocation=allocation)
    assert [plan.kept[str(i)][0] for i in range(4)] == [8] * 4
    assert "ratio=0.95 is out of reach: 0.875 of the channels go" in plan.warnings[0]
    assert "warning: ratio=0.95" in plan.explain()
