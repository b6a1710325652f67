"""Plans applied: what is sliced, what follows, replay from a file, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import slimkit as sk
from slimkit.errors import ArtifactError, PlanError
from slimkit.plan import applied_plans
from slimkit.prune.edits import Edit, _sliced, pack_indices, unpack_indices

X = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)


class Net(nn.Module):
    """Plain, grouped and transposed convolutions, norms, and a flattened head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.dw = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.norm = nn.GroupNorm(1, 16)
        self.act = nn.PReLU(16)
        self.fc = nn.Linear(16 * 16, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.a(x)))
        x = self.up(F.relu(self.grouped(self.dw(x))))
        x = F.adaptive_avg_pool2d(self.act(self.norm(x)), 4)
        return self.fc(x.flatten(1))


@pytest.fixture
def net():
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def plan(net):
    return sk.prune.plan(net, X, ratio=0.5)


def test_sizes_and_attributes_follow(net, plan):
    sk.apply(net, plan)
    assert net.a.weight.shape == (16, 3, 3, 3)
    assert net.a.out_channels == net.bn.num_features == net.bn.running_var.numel() == 16
    assert (net.dw.in_channels, net.dw.out_channels, net.dw.groups) == (16, 16, 16)
    grouped = net.grouped
    assert grouped.weight.shape[0] == grouped.out_channels
    assert grouped.weight.shape[1] * grouped.groups == grouped.in_channels == 16
    assert net.up.in_channels == net.up.weight.shape[0] == grouped.out_channels
    assert net.up.out_channels == net.up.weight.shape[1] == net.up.bias.numel() == 8
    assert net.norm.num_channels == net.act.num_parameters == 8
    assert net.fc.in_features == net.fc.weight.shape[1] == 8 * 16
    assert net(X).shape == (2, 5)


def test_the_pruned_network_trains(net, plan):
    sk.apply(net, plan).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    optimizer.step()


def test_flags_and_memory_format_stay_and_gradients_go(net, plan):
    net.to(memory_format=torch.channels_last)
    net.a.weight.requires_grad_(False)
    net(X).sum().backward()
    sk.apply(net, plan)
    assert not net.a.weight.requires_grad
    assert net.dw.weight.requires_grad
    assert net.grouped.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.a.weight.grad is None
    assert net.dw.weight.grad is None


def test_a_saved_plan_replays_on_a_fresh_model(net, plan, tmp_path, device):
    fresh = copy.deepcopy(net)
    expected = sk.apply(net, plan)(X)
    plan.save(tmp_path / "plan.json")
    loaded = sk.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.explain() == plan.explain()
    replayed = sk.apply(fresh.to(device), loaded)(X.to(device)).cpu()
    assert torch.allclose(replayed, expected, atol=1e-5)
    if device.type == "cpu":
        assert torch.equal(replayed, expected)


def test_weights_and_plans_rebuild_the_pruned_network(net, plan, tmp_path):
    expected = sk.apply(net, plan)(X)
    sk.save(net, tmp_path / "model")
    assert torch.equal(sk.load(tmp_path / "model", model=Net().eval())(X), expected)


def test_a_second_pruning_goes_on_top_and_both_are_saved(net, plan, tmp_path):
    sk.apply(net, plan)
    sk.apply(net, sk.prune.plan(net, X, ratio=0.4, round_to=2))
    expected = net(X)
    sk.save(net, tmp_path / "model")
    assert torch.equal(sk.load(tmp_path / "model", model=Net().eval())(X), expected)


def test_applying_twice_is_refused_and_changes_nothing(net, plan):
    sk.apply(net, plan)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PlanError, match="applied to this model before"):
        sk.apply(net, plan)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_another_network_is_refused_and_not_touched(plan):
    other = nn.Sequential(nn.Conv2d(3, 32, 3))
    with pytest.raises(PlanError, match="was made for Net"):
        sk.apply(other, plan)
    other = Net()
    other.grouped = nn.Conv2d(32, 32, 3, groups=2)
    before = {name: tensor.shape for name, tensor in other.state_dict().items()}
    with pytest.raises(PlanError, match=r"grouped\.weight: the plan expects shape"):
        sk.apply(other, plan)
    assert before == {name: tensor.shape for name, tensor in other.state_dict().items()}


def test_a_damaged_plan_is_refused(plan, tmp_path):
    path = plan.save(tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"keep"', '"kept_indices"'))
    with pytest.raises(ArtifactError, match="damaged"):
        sk.Plan.load(path)


def _shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _edit(place, **changes):
    def change(data):
        data["edits"][place].update(changes)

    return change


def _first(data):
    return next(n for n, edit in enumerate(data["edits"]) if len(unpack_indices(edit["keep"])) > 2)


def _rekept(change):
    def edit(data):
        held = data["edits"][_first(data)]
        held["keep"] = change(list(unpack_indices(held["keep"])))

    return edit


CHANGES = {
    "repeated": _rekept(lambda keep: [keep[0], *keep]),
    "unsorted": _rekept(lambda keep: keep[::-1]),
    "shortened": _rekept(lambda keep: keep[:-1]),
    "emptied": _rekept(lambda _: []),
    "negative": _rekept(lambda keep: [-1, *keep[1:]]),
    "too large": _rekept(lambda keep: [*keep[:-1], 99]),
    "endless": _rekept(lambda _: [[0, 10**15]]),
    "halves": _rekept(lambda keep: [each + 0.5 for each in keep]),
    "text": _rekept(lambda _: "all"),
    "null": _rekept(lambda _: None),
    "truth": _rekept(lambda keep: [False, *keep[1:]]),
    "dimension": _edit(-1, dim=7),
    "negative dimension": _edit(-1, dim=-1),
    "dimension as text": _edit(-1, dim="0"),
    "no such tensor": _edit(-1, tensor="nowhere.weight"),
    "tensor as a number": _edit(-1, tensor=3),
    "edit twice": lambda data: data["edits"].append(data["edits"][0]),
    "edit gone": lambda data: data["edits"].pop(),
    "shape gone": lambda data: data["shapes"].popitem(),
    "shapes gone": lambda data: data.update(shapes={}),
    "shape as text": lambda data: data["shapes"].update(dict.fromkeys(data["shapes"], "4")),
    "attributes gone": lambda data: data.update(attributes=[]),
    "attribute of nothing": lambda data: data["attributes"][0].update(module="nowhere"),
    "attribute with a strange place": lambda data: data["attributes"][0].update(attribute="a[b]"),
    "another size": lambda data: data["attributes"][0].update(after=3),
    "edits as mapping": lambda data: data.update(edits={"a": 1}),
    "layers": lambda data: data.update(layers=[1]),
    "network": lambda data: data.update(network=[1]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_does_not_fit_is_refused_before_the_first_tensor_changes(
    net, plan, tmp_path, name
):
    path = plan.save(tmp_path / "plan.json")
    held = json.loads(path.read_text())
    del held["sha256"]  # as if whoever changed it knew about it
    CHANGES[name](held["plan"])
    path.write_text(json.dumps(held))
    before, expected = _shapes(net), net(X)
    with pytest.raises((PlanError, ArtifactError)):
        sk.apply(net, sk.Plan.load(path))
    assert _shapes(net) == before
    assert torch.equal(net(X), expected)
    assert not applied_plans(net)


def test_a_plan_changed_in_its_file_is_refused(plan, tmp_path):
    path = plan.save(tmp_path / "plan.json")
    held = json.loads(path.read_text())
    held["plan"]["settings"]["note"] = "changed by hand"
    path.write_text(json.dumps(held))
    with pytest.raises(ArtifactError, match="not what was saved"):
        sk.Plan.load(path)


class Stack(nn.Module):
    """As ResNet-18 and ResNet-34: the deeper one has all tensors of the other, in equal shapes."""

    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(depth))
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.blocks(x))


@pytest.mark.parametrize(("made_for", "applied_to"), [(2, 3), (3, 2)])
def test_the_plan_of_a_shallower_or_deeper_network_is_refused(made_for, applied_to):
    x = torch.randn(2, 8)
    ignore = ["blocks.2.*"] * (made_for > 2)  # so that no edit misses its tensor
    plan = sk.prune.plan(Stack(made_for), x, ratio=0.5, round_to=1, ignore=ignore)
    other = Stack(applied_to)
    before, expected = _shapes(other), other(x)
    with pytest.raises(PlanError, match=r"blocks\.2\.0"):
        sk.apply(other, plan)
    assert _shapes(other) == before
    assert torch.equal(other(x), expected)


def test_the_plan_of_a_resnet_18_is_refused_by_a_resnet_34():
    models = pytest.importorskip("torchvision.models")
    x = torch.randn(1, 3, 32, 32)
    plan = sk.prune.plan(models.resnet18().eval(), x, ratio=0.5)
    other = models.resnet34().eval()
    before, expected = _shapes(other), other(x)
    with pytest.raises(PlanError, match="made for a ResNet without this parameter"):
        sk.apply(other, plan)
    assert _shapes(other) == before
    assert torch.equal(other(x), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.one = nn.Linear(16, 16, bias=False)
        self.two = nn.Linear(16, 16, bias=False)
        self.two.weight = self.one.weight
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last(F.relu(self.two(F.relu(self.one(F.relu(self.first(x)))))))


def test_tied_weights_stay_tied():
    model = Tied()
    x = torch.randn(4, 6)
    plan = sk.prune.plan(model, x, ratio=0.5)
    sk.apply(model, plan)
    assert model.two.weight is model.one.weight
    assert model.one.weight.shape == (8, 8)
    assert (model.two.in_features, model.two.out_features) == (8, 8)
    assert model(x).shape == (4, 3)


def test_indices_are_packed_as_runs_only_where_that_is_shorter():
    assert pack_indices([0, 1, 2, 3, 7, 8, 9]) == [[0, 4], [7, 10]]
    assert pack_indices([0, 2, 4]) == [0, 2, 4]


@given(st.sets(st.integers(0, 300)))
def test_packed_indices_come_back(indices):
    ordered = sorted(indices)
    assert list(unpack_indices(pack_indices(ordered))) == ordered


@pytest.mark.parametrize("dims", [(0, 1), (1, 0), (0, 1, 2), (1, 1, 0)])
def test_large_weights_are_sliced_as_small_ones(dims):
    weight = torch.randn(700, 500, 3)
    exact, edits = weight.numpy(), []
    for place, dim in enumerate(dims):
        keep = tuple(range(place, exact.shape[dim], 2))
        edits.append(Edit("weight", dim, keep))
        exact = exact.take(keep, dim)
    assert torch.equal(_sliced(weight, edits), torch.from_numpy(exact))
