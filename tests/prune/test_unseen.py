"""What the example forward did not show: heads of training, exits, modules that never ran."""

from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import slimkit as sk
from slimkit.errors import PatternError, PlanError
from slimkit.graph.capturing import capture, capture_both_modes
from slimkit.graph.equivalence import check_equivalence

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(inside, outside, size=3):
    return nn.Conv2d(inside, outside, size, padding=size // 2)


class Body(nn.Module):
    """Two layers and a head; ``extra`` runs where a subclass says so."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.out = conv(3, 32), conv(32, 32), conv(32, 5, 1)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        return self.out(self.body(y).relu()), y


class AuxiliaryHead(Body):
    """An auxiliary classifier behind a flattened map, in training only."""

    def __init__(self):
        super().__init__()
        self.aux = nn.ModuleList([conv(32, 16, 1), nn.BatchNorm2d(16), nn.Linear(16 * 4, 5)])
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        out, y = super().forward(x)
        if not self.training:
            return out
        aux = self.aux[1](self.aux[0](F.adaptive_avg_pool2d(y, 2)))
        return out, self.aux[2](self.drop(aux.relu().flatten(1)))


def kept(plan):
    return {name: after for name, (after, before) in plan.kept.items() if after < before}


@pytest.mark.parametrize("batch", [1, 2])
def test_an_auxiliary_head_of_training_is_pruned_along(batch):
    model = AuxiliaryHead().train()
    before = copy.deepcopy(model.state_dict())
    plan = sk.prune.plan(model, X[:batch], ratio=0.5)
    assert kept(plan) == {"stem": 16, "body": 16, "aux.0": 8}
    assert plan.warnings == ()
    assert plan.before.macs == sk.profile(model, X[:batch]).macs  # the head costs none
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert check_equivalence(model, plan, X).equal
    model = sk.apply(model, plan).train()
    out, aux = model(X)
    (out.sum() + aux.sum()).backward()
    assert aux.shape == (2, 5)
    assert model.aux[2].in_features == 8 * 4


def test_what_both_modes_run_is_recorded_once():
    graphs = capture_both_modes(Body(), X)
    assert graphs.both is graphs.evaluation
    graphs = capture_both_modes(AuxiliaryHead(), X)
    assert [str(op) for op in graphs.both.ops[: len(graphs.evaluation.ops)]] == [
        str(op) for op in graphs.evaluation.ops
    ]
    more = graphs.both.ops[len(graphs.evaluation.ops) :]
    assert sum("convolution" in op.name for op in more) == 1
    assert len(capture(AuxiliaryHead(), X).ops) == len(graphs.evaluation.ops)


def test_a_training_forward_leaves_nothing_behind():
    class Disturbing(AuxiliaryHead):
        def __init__(self):
            super().__init__()
            self.steps, self.cache = 0, {}
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.steps += 1
                self.cache[x.shape] = torch.rand(1)
                self.mean += np.random.rand() + random.random()  # noqa: NPY002
                with torch.no_grad():
                    self.stem.weight.mul_(0.9)  # a momentum encoder
                    self.out.bias.data = self.out.bias.data * 0.5
            return super().forward(x)

    model = Disturbing().train()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    sk.prune.plan(model, X, ratio=0.5)
    assert (model.steps, model.cache) == (0, {})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


def test_plans_of_a_network_with_random_paths_are_equal():
    class LayerDrop(Body):
        def forward(self, x):
            y = self.norm(self.stem(x))
            if not (self.training and torch.rand(()) < 0.5):
                y = self.body(y)
            return self.out(y)

    model = LayerDrop()
    plans = [sk.prune.plan(model, X, ratio=0.5).to_json() for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]


class NeedsTargets(AuxiliaryHead):
    """In training a loss inside, which the example has no targets for."""

    def forward(self, x, targets=None):
        if self.training:
            assert targets is not None, "targets in training"
        return super().forward(x)


def test_where_training_fails_what_an_unseen_head_could_read_stays_and_it_is_named():
    model = nn.Sequential(NeedsTargets(), conv(5, 16), conv(16, 3))
    plan = sk.prune.plan(model, X, ratio=0.5)
    assert kept(plan) == {"1": 8}
    (text,) = plan.warnings
    assert "0.aux (ModuleList)" in text
    assert "targets in training" in text
    assert f"warning: {text}" in plan.explain()
    assert "aux, which did not run, may read them" in plan.explain()


def test_a_training_forward_that_fails_is_silent_where_everything_ran():
    class Fails(Body):
        def forward(self, x):
            out, _ = super().forward(x)
            if self.training:
                raise ValueError("no targets")
            return out

    model = nn.Sequential(Fails(), conv(5, 3)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = sk.prune.plan(model, X, ratio=0.5)
    assert plan.warnings == ()
    assert kept(plan) == {"0.stem": 16, "0.body": 16}
    assert model.training


def test_an_error_says_how_to_release_what_is_protected():
    with pytest.raises(PlanError, match="aux, which did not run, may read them") as caught:
        sk.prune.plan(NeedsTargets(), X, ratio=0.5)
    assert "unused=" in caught.value.hint


def test_what_is_named_as_unused_protects_nothing():
    model = NeedsTargets()
    plan = sk.prune.plan(model, X, ratio=0.5, unused="aux.*")
    assert kept(plan) == {"stem": 16, "body": 16}
    assert plan.warnings == ()
    with pytest.raises(
        PatternError, match="'auxiliary' matches nothing that did not run"
    ) as caught:
        sk.prune.plan(model, X, ratio=0.5, unused=["aux", "auxiliary"])
    assert caught.value.where == "unused"


def test_only_what_the_caller_has_in_hand_is_protected():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = conv(16, 32), conv(32, 16)

        def forward(self, x):
            return x + self.outer(self.inner(x).relu())

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.out = conv(3, 16), Block(), conv(16, 4)
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))  # left over

        def forward(self, x):
            return self.out(self.block(self.stem(x)))

    plan = sk.prune.plan(Backbone(), X, ratio=0.5)
    assert kept(plan) == {"block.inner": 16}
    assert "head (Sequential)" in plan.warnings[0]
    assert kept(sk.prune.plan(Backbone(), X, ratio=0.5, unused=nn.Sequential))["stem"] == 8


def test_a_parameter_that_nothing_read_protects_what_stands_beside_it():
    class MaskToken(Body):
        def __init__(self):
            super().__init__()
            self.token, self.scale = (
                nn.Parameter(torch.zeros(1, 32, 1, 1)),
                nn.Parameter(torch.ones(1)),
            )

        def forward(self, x, mask=None):
            out, y = super().forward(x)
            return out if mask is None else out + (self.scale * self.token * mask + y).sum()

    plan = sk.prune.plan(MaskToken(), X, ratio=0.5, unused="token")
    assert kept(plan) == {"stem": 16, "body": 16}
    assert plan.warnings == ()  # a parameter of one element fits any number
    model = nn.Sequential(MaskToken(), conv(5, 16), conv(16, 3))
    plan = sk.prune.plan(model, X, ratio=0.5)
    assert kept(plan) == {"1": 8}
    assert "0.token (parameter)" in plan.warnings[0]


class EarlyExit(nn.Module):
    """A classifier in the middle whose scores decide whether the rest runs."""

    def __init__(self, sure):
        super().__init__()
        self.a, self.exit1 = (
            conv(3, 16),
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)),
        )
        self.b, self.exit2, self.sure = conv(16, 32), nn.Linear(32, 10), sure

    def decided(self, scores):
        return scores.softmax(-1).max() > self.sure

    def forward(self, x):
        y = self.a(x).relu()
        early = self.exit1(y.mean((2, 3)))
        if self.decided(early):
            return early
        return self.exit2(self.b(y).relu().mean((2, 3)))


class ByItem(EarlyExit):
    def decided(self, scores):
        return (
            -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean().item() < 2 * self.sure - 1
        )


class ByList(EarlyExit):
    def decided(self, scores):
        return max(scores.amax(-1).tolist()) > 100 * self.sure


class PerSample(EarlyExit):
    def forward(self, x):
        y = self.a(x).relu()
        scores = self.exit1(y.mean((2, 3)))
        unsure = scores.softmax(-1).amax(-1) <= self.sure
        late = self.exit2(self.b(y[unsure]).relu().mean((2, 3)))
        return late, unsure


@pytest.mark.parametrize("kind", [EarlyExit, ByItem, ByList, PerSample])
def test_scores_that_decide_keep_their_classes(kind):
    torch.manual_seed(0)
    model = kind(0.9)
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    assert plan.kept["exit1.2"] == (10, 10)
    assert plan.kept["exit1.0"] == (8, 16)
    assert plan.kept["a"] == (8, 16)
    assert "a branch in the model itself depends on them" in plan.explain()
    assert check_equivalence(model, plan, X).equal


def test_an_exit_that_was_taken_names_the_layers_behind_it_and_keeps_what_they_read():
    model = EarlyExit(0.0)
    plan = sk.prune.plan(model, X, ratio=0.5)
    assert plan.kept["a"] == (16, 16)
    assert plan.kept["exit1.0"] == (8, 16)
    assert "b (Conv2d), exit2 (Linear)" in plan.warnings[0]
    model = sk.apply(model, plan)
    model.sure = 1.0
    assert model(X).shape == (2, 10)
