"""One channel after the other: masks do what removing the channel would."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk
from slimkit.errors import InputError, PlanError
from slimkit.prune.criteria.fisher import GroupFisher
from slimkit.prune.fisher_pruning import one_by_one
from slimkit.prune.planning import space

X = torch.zeros(1, 2, 6, 6, dtype=torch.float64)


class Net(nn.Module):
    """A residual sum, a depthwise layer, a flattened map."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.outer = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.depthwise(F.gelu(self.inner(x)))))
        return self.head(F.gelu(self.fc(F.max_pool2d(x, 2).flatten(1))))


@pytest.fixture
def model():
    return Net().double()


@pytest.fixture
def batches():
    labels = torch.arange(5) % 3
    return [(torch.randn(5, 2, 6, 6, dtype=torch.float64), labels) for _ in range(2)]


def sizes(model):
    return model.stem.out_channels, model.inner.out_channels, model.fc.out_features


@pytest.mark.parametrize("normalise", ["macs", None])
def test_masking_one_after_the_other_is_removing_one_after_the_other(model, batches, normalise):
    plan = one_by_one(
        *(model, X, batches, F.cross_entropy),
        macs=0.6,
        every=2,
        normalise=normalise,
        round_to=1,
        min_channels=2,
    )
    slow = copy.deepcopy(model).eval()
    whole = sk.profile(slow, X).macs
    criterion = GroupFisher(batches, F.cross_entropy, normalise=normalise)
    removed = 0
    while sk.profile(slow, X).macs > 0.4 * whole:
        choices = space(slow, X, criterion=criterion, round_to=1, min_channels=2)
        least = {name: float(scores.min()) for name, scores in choices.scores.items()}
        name = min(least, key=least.__getitem__)
        counts = {group.name: group.size - (group.name == name) for group in choices.groups}
        sk.apply(slow, choices.plan(counts))
        removed += 1
    fast = sk.apply(copy.deepcopy(model), plan).eval()
    assert removed >= 8
    assert sizes(fast) == sizes(slow)
    image = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    assert torch.allclose(fast(image), slow(image))


@pytest.mark.parametrize(("target", "round_to"), [("macs", 4), ("params", 1), ("params", 2)])
def test_the_target_is_met_with_rounding(model, batches, target, round_to):
    before = copy.deepcopy(model.state_dict())
    options = {"every": 1, "at_once": 3, "round_to": round_to, "normalise": "activations"}
    plan = one_by_one(model, X, batches, F.cross_entropy, **{target: 0.4}, **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    whole = getattr(sk.profile(model, X), target)
    sk.apply(model, plan)
    left = getattr(sk.profile(model, X), target) / whole
    assert left <= 0.6
    assert left >= 0.4
    assert plan.settings["allocation"] == "one_by_one"


def test_weights_are_trained_meanwhile_if_there_is_an_optimizer(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.eval()
    model.norm.train()

    def total():
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in batches)

    before = total()
    plan = one_by_one(
        *(model, X, batches, F.cross_entropy),
        macs=0.3,
        every=3,
        optimizer=optimizer,
        round_to=1,
    )
    assert not model.training
    assert model.norm.training
    sk.apply(model, plan, optimizer=optimizer)
    assert total() < before
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())


def test_mistakes_are_named(model, batches):
    def fails(error, match, data=batches, round_to=1, **options):
        with pytest.raises(error, match=match):
            one_by_one(model, X, data, F.cross_entropy, round_to=round_to, **options)

    fails(InputError, "exactly one target")
    fails(InputError, "every: expected an integer ≥ 1", macs=0.5, every=0)
    fails(InputError, "at_once: expected an integer, got 1.5", macs=0.5, at_once=1.5)
    fails(InputError, "normalise: expected macs or activations", macs=0.5, normalise="flops")
    fails(InputError, "there are no batches", [], macs=0.5)
    fails(InputError, "an iterator is empty", iter(batches), macs=0.5)
    fails(PlanError, "out of reach", macs=0.99, round_to=2)


def test_samples_that_cannot_be_told_apart_cannot_be_trained_on():
    net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
    tokens = torch.randn(5, 4, 3)  # tokens first

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.transpose(0, 1)).mean(dim=0)

    model, data = First(), [(tokens.transpose(0, 1), torch.arange(4) % 2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"macs": 0.3, "every": 1, "round_to": 1}
    with pytest.raises(InputError, match="cannot be told apart"):
        one_by_one(model, data[0][0], data, F.cross_entropy, optimizer=optimizer, **options)
    plan = one_by_one(model, data[0][0], data, F.cross_entropy, **options)
    assert plan.kept["net.0"] == (5, 8)
