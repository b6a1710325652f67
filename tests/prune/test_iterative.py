"""Pruning in steps: the target is that of the original network, whatever the steps do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk
from slimkit.errors import InputError, PlanError, UnknownNameError
from slimkit.prune.iterative import iterate

X = torch.zeros(1, 3, 16, 16)


class Net(nn.Module):
    """A stem, a residual block, a head."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.outer(F.relu(self.norm(self.inner(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def model():
    return Net()


def idle(model, step):
    pass


def widths(model):
    return model.stem.out_channels, model.inner.out_channels


@pytest.mark.parametrize("target", ["ratio", "macs", "params"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_steps_end_where_one_plan_would(model, target, round_to):
    at_once = copy.deepcopy(model)
    sk.apply(at_once, sk.prune.plan(at_once, X, **{target: 0.5}, round_to=round_to))
    seen = []

    def train(net, step):
        assert net is model
        seen.append((step, *widths(net)))

    options = {target: 0.5, "round_to": round_to}
    plans = iterate(model, X, steps=4, train=train, schedule="linear", **options)
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    assert seen[-1][1:] == widths(at_once) == widths(model)
    for column in (1, 2):
        sizes = [row[column] for row in seen]
        assert sizes == sorted(sizes, reverse=True)
    assert len(plans) == 4 or round_to == 8
    assert plans[0].settings["step"] == "1 of 4"
    assert all(later.before == earlier.after for earlier, later in itertools.pairwise(plans))


def test_a_schedule_says_how_fast(model):
    taken = {}
    for schedule in ("linear", "cubic", lambda part: part**2):
        taken[schedule if isinstance(schedule, str) else "late"] = sizes = []
        iterate(
            copy.deepcopy(model),
            X,
            steps=4,
            schedule=schedule,
            train=lambda net, _, sizes=sizes: sizes.append(net.stem.out_channels),
            ratio=0.5,
            round_to=1,
        )
    assert taken["linear"] == [28, 24, 20, 16]
    assert taken["cubic"] == [23, 18, 16, 16]  # 32 - 16 · (1 - 0.75³) = 22.75, then 18, 16.25
    assert taken["late"] == [31, 28, 23, 16]


def test_channels_are_chosen_anew_by_what_training_made_of_them(model):
    def train(net, step):
        if step == 0:  # what was best is now worst
            with torch.no_grad():
                best = net.inner.weight.flatten(1).norm(dim=1).topk(10).indices
                net.inner.weight[best] *= 0.001
            train.marked = net.inner.weight[best[0], 0, 0, 0].item()

    iterate(model, X, steps=2, schedule="linear", train=train, ratio=0.5, round_to=1, only="inner")
    assert model.inner.weight.shape[0] == 32
    assert train.marked not in model.inner.weight.flatten().tolist()
    assert model.inner.weight.abs().flatten(1).amax(dim=1).min() > 0.01


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("target", ["macs", "params"])
def test_what_is_left_can_be_divided_anew_in_each_step(model, allocation, target):
    before = sk.profile(model, X)
    plans = iterate(
        model,
        X,
        steps=3,
        train=idle,
        reallocate=True,
        allocation=allocation,
        round_to=1,
        **{target: 0.6},
    )
    left = getattr(sk.profile(model, X), target) / getattr(before, target)
    assert 0.36 <= left <= 0.4
    costs = [getattr(plan.after, target) / getattr(before, target) for plan in plans]
    for cost, share in zip(costs, (19 / 27, 26 / 27, 1), strict=True):
        assert cost == pytest.approx(1 - 0.6 * share, abs=0.04)


def test_weights_and_all_plans_are_saved_and_loaded(model, tmp_path):
    torch.manual_seed(1)

    def train(net, step):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    iterate(model, X, steps=3, train=train, macs=0.5, round_to=1)
    sk.save(model, tmp_path / "pruned")
    fresh = sk.load(tmp_path / "pruned", model=Net())
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh.eval()(image), model.eval()(image))


def test_one_optimizer_trains_through_all_steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5

    def train(net, step):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net.train()(images), labels).backward()
            optimizer.step()

    iterate(model, X, steps=3, train=train, ratio=0.5, round_to=1, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_criteria_that_look_at_data_are_asked_in_every_step(model):
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    seen = []

    def loss(outputs, targets):
        seen.append(outputs.shape)
        return F.cross_entropy(outputs, targets)

    from slimkit.prune.criteria.gradients import Taylor

    iterate(model, X, steps=2, train=idle, ratio=0.5, criterion=Taylor(batches, loss))
    assert len(seen) >= 3
    assert widths(model) == (16, 32)


def test_mistakes_are_found_before_anything_is_trained(model):
    before = copy.deepcopy(model.state_dict())

    def train(net, step):
        raise AssertionError("trained")

    def fails(error, match, **options):
        with pytest.raises(error, match=match):
            iterate(model, X, train=train, **options)

    fails(InputError, "exactly one target")
    fails(InputError, "steps: expected an integer ≥ 1", ratio=0.5, steps=0)
    fails(UnknownNameError, "did you mean 'cubic'", ratio=0.5, schedule="qubic")
    fails(InputError, "must rise from 0 to 1", ratio=0.5, schedule=lambda part: part / 2)
    fails(
        InputError,
        "must rise from 0 to 1",
        ratio=0.5,
        schedule=lambda part: 1 - (part - 1) ** 2 * 9,
    )
    fails(InputError, "reallocate: a target of ratio", ratio=0.5, reallocate=True)
    fails(PlanError, "out of reach", params=0.99, round_to=8)
    fails(PlanError, "out of reach", params=0.99, round_to=8, reallocate=True)
    fails(UnknownNameError, "unknown criterion", ratio=0.5, criterion="l3")
    fails(TypeError, "criterium", ratio=0.5, criterium="l2")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
