"""Sparse training: the terms against sums by hand, and what training with them does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk
from slimkit.errors import InputError, PatternError, PlanError
from slimkit.graph.capturing import capture
from slimkit.graph.grouping import dependency_groups
from slimkit.inputs import as_inputs
from slimkit.prune.criteria.scores import channel_rows
from slimkit.prune.sparse_training import BatchNormL1, GroupLasso
from slimkit.train import Callback, StepContext, TrainSettings, fit

X = torch.zeros(1, 2, 8, 8)


class Net(nn.Module):
    """A residual sum, a depthwise and a grouped layer, a flattened map, one weight used twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.wide = nn.BatchNorm2d(12)
        self.point = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8 * 16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.relu(self.wide(self.grouped(self.depthwise(x)))))
        return self.head(F.relu(self.fc(F.max_pool2d(x, 2).flatten(1))))


@pytest.fixture
def model():
    net = Net()
    for norm in (net.norm, net.wide):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
    return net


def groups_of(model):
    found = dependency_groups(capture(model, as_inputs(X)), model)
    return [group for group in found if group.frozen_reason is None]


def by_hand(model):
    """Group name → (squared norm, number of weights) of each channel."""
    named = dict(model.named_parameters())
    found = {}
    for group in groups_of(model):
        rows = [
            channel_rows(slot, named)
            for slot in group.slots
            if slot.tensor in named and "bias" not in slot.tensor
        ]
        found[group.name] = torch.cat(rows, dim=1).square().sum(dim=1), sum(len(r[0]) for r in rows)
    return found


def test_group_lasso_sums_the_norms_of_all_weights_of_a_channel(model):
    expected = sum(float((n * squares).sqrt().sum()) for squares, n in by_hand(model).values())
    assert GroupLasso(model, X, weight=0.5)(model).item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_small_channels_are_pushed_harder(model):
    expected = 0.0
    for squares, n in by_hand(model).values():
        pushed = 2 ** (4 * (squares.max() - squares) / (squares.max() - squares.min()))
        expected += float((pushed * (n * squares).sqrt()).sum())
    term = GroupLasso(model, X, weight=1.0, growth=4)
    assert term(model).item() == pytest.approx(expected, rel=1e-5)
    # The factor is a weight, not something to train: gradients go along the plain one's.
    plain = GroupLasso(model, X, weight=1.0)
    for weight in (model.fc.weight, model.wide.weight):
        (grown,), (usual,) = (torch.autograd.grad(t(model), [weight]) for t in (term, plain))
        assert ((grown.abs() >= usual.abs() - 1e-6) & (grown * usual >= 0)).all()


def test_the_gradient_shrinks_each_channel_along_its_weights(model):
    term = GroupLasso(model, X, weight=0.1)
    term(model).backward()
    squares, n = by_hand(model)["fc"]
    named = dict(model.named_parameters())
    # Row c of fc is computed by channel c of its group; its columns belong to the stem's group.
    stem, m = by_hand(model)["stem"]
    (slot,) = [
        s for g in groups_of(model) if g.name == "stem" for s in g.slots if s.tensor == "fc.weight"
    ]
    columns = torch.empty(128)
    for channel, places in enumerate(slot.positions):
        columns[torch.as_tensor(places)] = (m / stem[channel]).sqrt()
    expected = 0.1 * named["fc.weight"] * ((n / squares).sqrt()[:, None] + columns[None])
    assert torch.allclose(model.fc.weight.grad, expected, rtol=1e-4)
    assert model.stem.bias.grad is None
    assert model.head.bias.grad is None


def test_a_channel_that_is_gone_stays_where_it_is(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    term = GroupLasso(model, X, growth=4)
    term(model).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert term.sparsity() == 1.0


def test_batch_norm_l1_is_the_sum_of_the_scales_of_channels_that_can_go(model):
    term = BatchNormL1(model, X, weight=0.01)
    expected = 0.01 * (model.norm.weight.abs().sum() + model.wide.weight.abs().sum())
    assert torch.isclose(term(model), expected)
    term(model).backward()
    assert torch.allclose(model.wide.weight.grad, 0.01 * model.wide.weight.sign())
    only_wide = BatchNormL1(model, X, weight=1.0, ignore="stem")
    assert torch.isclose(only_wide(model), model.wide.weight.abs().sum())


def test_sparsity_is_the_share_of_small_channels(model):
    lasso, scales = GroupLasso(model, X), BatchNormL1(model, X)
    assert lasso.sparsity() == scales.sparsity() == 0.0
    groups = {g.name: g for g in groups_of(model)}
    with torch.no_grad():
        model.wide.weight[[0, 6]] = 0.001  # one channel of the grouped layer is two of these
        for slot in groups["fc"].slots:
            dict(model.named_parameters())[slot.tensor].index_fill_(slot.dim, torch.arange(2), 0)
    norms = [name for name in groups if any("norm" in s.tensor for s in groups[name].slots)]
    norms += [name for name in groups if any("wide" in s.tensor for s in groups[name].slots)]
    assert scales.sparsity() == pytest.approx(1 / sum(groups[name].size for name in set(norms)))
    assert lasso.sparsity() == pytest.approx(2 / sum(g.size for g in groups.values()))


def test_frozen_weights_are_left_out(model):
    model.stem.requires_grad_(False)
    model.fc.requires_grad_(False)
    model.head.requires_grad_(False)
    GroupLasso(model, X)(model).backward()
    assert model.stem.weight.grad is None
    assert model.grouped.weight.grad is not None
    assert GroupLasso(model, X).sparsity(1e9) == 1.0
    with pytest.raises(PlanError, match="none of the weights that could go are trained"):
        GroupLasso(model.requires_grad_(False), X)


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[4].weight = net[2].weight
    net.append(nn.Linear(6, 2))
    x = torch.zeros(1, 4)
    term = GroupLasso(net, x, weight=1.0)
    term(net).backward()
    first = net[2].weight.grad.clone()
    twin = copy.deepcopy(net)
    assert torch.equal(term(twin), term(net))
    assert torch.isfinite(first).all()
    assert first.abs().sum() > 0


def test_the_term_follows_the_model_to_other_devices_and_precisions(model, device):
    term = GroupLasso(model, X, weight=1.0, growth=2.0)
    here = term(model).item()
    model.to(device)
    assert term(model).device.type == device.type
    assert term(model).item() == pytest.approx(here, rel=1e-5)
    assert term(model.double()).item() == pytest.approx(here, rel=1e-5)
    assert term(model.bfloat16()).item() == pytest.approx(here, rel=1e-2)


def test_mistakes_are_named(model):
    with pytest.raises(InputError, match="weight: expected a number ≥ 0"):
        GroupLasso(model, X, weight=-1.0)
    with pytest.raises(InputError, match="growth: expected a finite number, got nan"):
        GroupLasso(model, X, growth=float("nan"))
    with pytest.raises(PatternError):
        GroupLasso(model, X, ignore="stme")
    with pytest.raises(PlanError, match="no channels of Linear can be pruned"):
        GroupLasso(nn.Linear(4, 2), torch.zeros(1, 4))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(PlanError, match="no batch normalization of Sequential"):
        BatchNormL1(plain, torch.zeros(1, 4))
    term = GroupLasso(model, X)
    with pytest.raises(InputError, match=r"no parameter .*, not a wrapper"):
        term(nn.Sequential(model))
    sk.apply(model, sk.prune.plan(model, X, ratio=0.5, round_to=1))
    with pytest.raises(InputError, match="make a new one after pruning"):
        term(model)


# --- in training --------------------------------------------------------------------------


class Loader(list):
    """Batches with a length."""


def data(count=6):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8) % 3
    images = [torch.randn(8, 2, 8, 8, generator=generator) for _ in range(count)]
    return Loader((image + labels[:, None, None, None], labels) for image in images)


def test_channels_fall_until_they_can_leave_unnoticed():
    net = nn.Sequential(
        *(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )
    batches = data()
    term = GroupLasso(net, X, weight=5e-3, growth=4.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(150):
        images, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        (F.cross_entropy(net(images), labels) + term(net)).backward()
        optimizer.step()
    share = term.sparsity(1e-2)
    assert 0.4 <= share < 1
    net.eval()
    images, labels = batches[0]
    before = net(images)
    plan = sk.prune.plan(net, X, ratio=0.5 * share, round_to=1, criterion="group_l2")
    assert torch.allclose(sk.apply(net, plan)(images), before, atol=0.02)
    assert (before.argmax(dim=1) == labels).all()


@pytest.mark.parametrize("kind", [GroupLasso, BatchNormL1])
def test_a_run_that_was_killed_ends_like_one_that_was_not(kind, tmp_path):
    settings = TrainSettings(epochs=3, lr=0.02, precision="fp32", device="cpu")

    class Kill(Callback):
        def on_step_end(self, context: StepContext) -> None:
            if context.step == 8:
                raise KeyboardInterrupt

    def run(checkpoint, *callbacks, losses=True):
        torch.manual_seed(0)
        net = Net()
        terms = [kind(net, X, weight=1e-2)] if losses else []
        fit(
            *(net, data()),
            loss_fn=F.cross_entropy,
            settings=settings,
            losses=terms,
            callbacks=callbacks,
            checkpoint=checkpoint,
            progress=False,
        )
        return net

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Kill())
    again = run(tmp_path / "killed")
    without = run(tmp_path / "without", losses=False)
    for first, second in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    assert without.wide.weight.abs().sum() > whole.wide.weight.abs().sum()
