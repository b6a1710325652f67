"""Criteria from gradients against derivatives taken by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk
from slimkit.errors import DataError, InputError, PlanError
from slimkit.graph.capturing import capture
from slimkit.graph.grouping import dependency_groups
from slimkit.inputs import LossOfBatch, as_batch, as_inputs
from slimkit.prune.batches import samples_of
from slimkit.prune.criteria.fisher import GroupFisher
from slimkit.prune.criteria.gradients import OBD, Taylor
from slimkit.prune.planning import space


class Net(nn.Module):
    """A residual sum, a depthwise and a grouped convolution, a flattened map, a shared head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.point = nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4 * 16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.point(F.gelu(self.grouped(F.relu(self.depthwise(x)))))
        x = F.max_pool2d(F.gelu(self.up(x)), 2)
        return self.head(torch.tanh(self.fc(x.flatten(1))))


class TokensFirst(nn.Module):
    """Puts tokens before samples, and both into one dimension, as attention layers do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.second = nn.Linear(8, 6)
        self.third = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = F.gelu(self.second(F.gelu(self.first(x.transpose(0, 1)))))
        flat = F.gelu(self.third(tokens.flatten(0, 1)))
        return self.head(flat.unflatten(0, (x.shape[1], x.shape[0])).mean(dim=0))


def trained(model):
    """Statistics and scales that are not those of a new network."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.2)
    return model.double().eval()


@pytest.fixture
def model():
    return trained(Net())


@pytest.fixture
def batches():
    def batch(count):
        return torch.randn(count, 2, 4, 4, dtype=torch.float64), torch.randint(3, (count,))

    return [batch(5), batch(3)]


def groups_of(model, inputs):
    found = dependency_groups(capture(model, as_inputs(inputs)), model)
    return [group for group in found if group.frozen_reason is None]


def scores(criterion, model, groups):
    ready = criterion.prepare(model, groups)
    return {g.name: ready(g, {}) for g in groups if g.name in ready.scores}


def slope(function, step=1e-6):
    """The derivative of ``function`` at 1."""
    return (function(1 + step) - function(1 - step)) / (2 * step)


def scaled_loss(model, group, channel, batch, names):
    """Factor → loss, when the channel's weights in the named tensors have that factor."""

    def at(factor):
        twin = copy.deepcopy(model)
        named = dict(twin.named_parameters())
        with torch.no_grad():
            for slot in group.slots:
                if slot.tensor in names:
                    places = torch.as_tensor(slot.positions[channel])
                    named[slot.tensor].index_copy_(
                        slot.dim, places, factor * named[slot.tensor].index_select(slot.dim, places)
                    )
            return float(F.cross_entropy(twin(batch[0]), batch[1]))

    return at


def test_taylor_is_the_derivative_of_scaling_the_filters(model, batches):
    groups = groups_of(model, batches[0][0])
    found = scores(Taylor(batches, F.cross_entropy), model, groups)
    assert {"stem", "grouped", "up", "fc"} <= found.keys()
    for group in groups:
        filters = {s.tensor for s in group.slots if s.role == "producer"}
        for channel in (0, group.size - 1):
            expected = [
                abs(slope(scaled_loss(model, group, channel, batch, filters))) for batch in batches
            ]
            assert found[group.name][channel] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_taylor_over_all_members_adds_what_each_parameter_changes(model, batches):
    groups = groups_of(model, batches[0][0])
    found = scores(Taylor(batches[:1], F.cross_entropy, members="all"), model, groups)
    for group in groups:
        # One dimension after the other: a weight that makes and reads a channel counts twice.
        expected = 0.0
        for slot in group.slots:
            if slot.tensor in dict(model.named_parameters()):
                alone = type(group)(group.name, group.size, (slot,))
                expected += slope(scaled_loss(model, alone, 1, batches[0], {slot.tensor}))
        assert found[group.name][1] == pytest.approx(abs(expected), rel=1e-4)


def test_taylor_squares_each_batch_and_reduces_members(model, batches):
    groups = groups_of(model, batches[0][0])
    each = [scores(Taylor([batch], F.cross_entropy), model, groups) for batch in batches]
    squared = scores(Taylor(batches, F.cross_entropy, squared=True), model, groups)
    for name, found in squared.items():
        expected = (each[0][name] ** 2 + each[1][name] ** 2) / 2
        assert torch.allclose(found, expected, rtol=1e-9)
    joint, apart = (
        scores(Taylor(batches, F.cross_entropy, reduction=r), model, groups)
        for r in ("joint", "sum")
    )
    assert torch.allclose(joint["fc"], apart["fc"])  # one member
    assert (joint["stem"] <= apart["stem"] + 1e-12).all()  # |a + b| ≤ |a| + |b|
    assert not torch.allclose(joint["stem"], apart["stem"])


def test_obd_is_half_the_squared_weight_times_the_squared_gradient_of_each_sample(model, batches):
    groups = groups_of(model, batches[0][0])
    found = scores(OBD(batches, F.cross_entropy), model, groups)
    expected = torch.zeros_like(model.fc.weight)
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(image[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, [model.fc.weight])
            expected += gradient**2 / 8
    saliency = (model.fc.weight**2 * expected / 2).detach()
    assert torch.allclose(found["fc"], saliency.sum(dim=1), rtol=1e-6)
    batchwise = scores(OBD(batches, F.cross_entropy, per_sample=False), model, groups)
    assert not torch.allclose(found["fc"], batchwise["fc"])


def masked_slope(model, group, channel, image, label):
    """∂loss/∂mask of one sample, by differences, with masks put in by hand."""

    def at(factor):
        twin = copy.deepcopy(model)

        def mask(channels):
            def hook(_module, args):
                x = args[0].clone()
                x[:, channels] *= factor
                return (x, *args[1:])

            return hook

        for slot in group.slots:
            layer = twin.get_submodule(slot.module)
            places = slot.positions[channel]
            if slot.role == "consumer":
                per_group = layer.weight.shape[1]
                if layer is twin.grouped:
                    places = [p + j * per_group for p in places for j in range(layer.groups)]
                layer.register_forward_pre_hook(mask(list(places)))
            elif layer is twin.depthwise:
                layer.register_forward_pre_hook(mask(list(places)))
        with torch.no_grad():
            return float(F.cross_entropy(twin(image[None]), label[None]))

    return slope(at)


def test_group_fisher_is_the_squared_derivative_of_the_shared_mask(model, batches):
    groups = groups_of(model, batches[0][0])
    found = scores(GroupFisher(batches, F.cross_entropy, normalise=None), model, groups)
    assert {group.name for group in groups} == found.keys()
    for group in groups:
        expected = sum(
            masked_slope(model, group, 1, image, label) ** 2
            for images, labels in batches
            for image, label in zip(images, labels, strict=True)
        )
        assert found[group.name][1] == pytest.approx(expected, rel=1e-4)


def test_a_channel_is_charged_what_it_saves(model, batches):
    x = batches[0][0][:1]
    groups = groups_of(model, x)
    plain, per_mac, per_element = (
        scores(GroupFisher(batches, F.cross_entropy, normalise=n), model, groups)
        for n in (None, "macs", "activations")
    )
    choices = space(model, x, round_to=1)
    for group in groups:
        saved = choices.cost().macs - choices.cost({group.name: group.size - 1}).macs
        assert torch.allclose(per_mac[group.name], plain[group.name] / (saved / 1e9))
    assert torch.allclose(per_element["up"], plain["up"] / (8 * 8 / 1e6))
    assert torch.allclose(per_element["fc"], plain["fc"] / 1e-6)
    # stem, depthwise and point make maps of 4 × 4, and two channels go at once (the grouped layer)
    stem = 2 * 3 * 4 * 4 / 1e6
    assert torch.allclose(per_element["stem"], plain["stem"] / stem)


def test_samples_are_told_apart_where_tokens_come_first():
    model = trained(TokensFirst())
    x, labels = torch.randn(2, 6, 3, dtype=torch.float64), torch.randint(3, (2,))
    groups = groups_of(model, x)
    single = [(x[i : i + 1], labels[i : i + 1]) for i in range(2)]
    together, alone = (
        scores(GroupFisher(b, F.cross_entropy, normalise=None), model, groups)
        for b in ([(x, labels)], single)
    )
    assert together.keys() == {"first", "second", "third"}
    for name, found in together.items():
        assert torch.allclose(found, alone[name], rtol=1e-9)


def test_layers_that_cannot_be_seen_leave_their_group_alone():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 8)
            self.weight = nn.Parameter(torch.randn(2, 8))

        def forward(self, x):
            return self.b(self.a(x).relu()).relu() @ self.weight.t()

    model, x = Hidden(), torch.randn(4, 3)
    criterion = GroupFisher([(x, torch.randint(2, (4,)))], F.cross_entropy)
    plan = sk.prune.plan(model, x, ratio=0.5, round_to=1, criterion=criterion)
    assert [plan.kept[name] for name in ("a", "b")] == [(4, 8), (8, 8)]
    assert "no layer was seen that reads these channels" in plan.explain()


def test_plans_follow_the_criterion(model, batches):
    for criterion in (
        Taylor(batches, F.cross_entropy),
        OBD(batches, F.cross_entropy),
        GroupFisher(batches, F.cross_entropy),
    ):
        groups = {g.name: g for g in groups_of(model, batches[0][0])}
        best = scores(criterion, model, list(groups.values()))["fc"].topk(3).indices
        plan = sk.prune.plan(model, batches[0][0], ratio=0.5, round_to=1, criterion=criterion)
        (kept,) = [e.keep for e in plan.edits if (e.tensor, e.dim) == ("fc.weight", 0)]
        assert sorted(kept) == sorted(best.tolist())
        assert "tensor(" not in plan.explain()
        assert type(criterion).__name__ in plan.explain()


@pytest.mark.parametrize("kind", [Taylor, OBD, GroupFisher])
def test_the_model_is_left_as_it_was(kind, batches):
    model = trained(Net()).train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    groups = groups_of(model, batches[0][0])
    state = torch.get_rng_state()
    scores(kind(Noisy(batches), F.cross_entropy), model, groups)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert (model.head.weight.grad == 1).all()


class Noisy:
    """Batches that draw random numbers."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for images, labels in self.batches:
            yield images + 0.1 * torch.randn_like(images), labels


@pytest.mark.parametrize("kind", [Taylor, OBD, GroupFisher])
def test_mistakes_are_named(kind, model, batches):
    groups = groups_of(model, batches[0][0])

    def fails(error, match, data=batches, loss=F.cross_entropy):
        with pytest.raises(error, match=match):
            kind(data, loss).prepare(model, groups)

    fails(InputError, "there are no batches", [])
    fails(InputError, "batches: expected something to iterate over, got 3", 3)
    fails(InputError, r"no targets: give \(inputs, targets\)", [batches[0][0]])
    fails(InputError, r"batches\[0\]: expected a tensor, .* got a int", [3])
    fails(InputError, "loss: the loss is nan", [(batches[0][0] * float("nan"), batches[0][1])])
    fails(InputError, r"scalar tensor, got \(\d, 3\)", loss=lambda y, t: y)
    fails(InputError, "scalar tensor, got float", loss=lambda y, t: 1.0)
    fails(InputError, "does not depend on", loss=lambda y, t: F.cross_entropy(y.detach(), t))
    fails(InputError, "fails with ZeroDivisionError", loss=lambda y, t: 1 / 0)
    fails(InputError, "fails with RuntimeError", [(torch.zeros(5, 3, 4, 4), batches[0][1])])
    loader = type("Loader", (list,), {"role": "test"})(batches)
    fails(DataError, "test split", loader)
    with pytest.raises(InputError, match="has not looked at its batches"):
        kind(batches, F.cross_entropy)(groups[0], {})


def test_a_used_up_iterator_is_explained(model, batches):
    groups = groups_of(model, batches[0][0])
    once = Taylor(iter(batches), F.cross_entropy)
    once.prepare(model, groups)
    with pytest.raises(InputError, match="an iterator is empty"):
        once.prepare(model, groups)


def test_channels_that_the_loss_does_not_see_stay():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(3, 8)
            self.head_a, self.head_b = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.head_a(self.a(x).relu()), self.head_b(self.b(x).relu())

    model, x = TwoHeads(), torch.randn(4, 3)
    batches = [(x, torch.randint(2, (4,)))]
    criterion = Taylor(batches, lambda y, t: F.cross_entropy(y[0], t))
    plan = sk.prune.plan(model, x, ratio=0.5, round_to=1, criterion=criterion)
    assert plan.kept["a"] == (4, 8)
    assert plan.kept["b"] == (8, 8)
    assert "the loss does not depend on these channels" in plan.explain()
    groups = {g.name: g for g in groups_of(model, x)}
    with pytest.raises(PlanError, match="does not depend"):
        criterion.prepare(model, list(groups.values()))(groups["b"], {})


def test_batches_come_in_every_form_a_model_is_called_with():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, y):
            return self.b((self.a(x) + y).relu())

    model, x, y = Sum(), torch.randn(4, 3), torch.randn(4, 1)
    targets = torch.randint(2, (4,))
    groups = groups_of(model, (x, y))
    forms = [(x, y), {"x": x, "y": y}, sk.Inputs((x,), {"y": y})]
    for kind in (Taylor, OBD, GroupFisher):
        first, *rest = (
            scores(kind([(form, targets)], F.cross_entropy), model, groups)["a"] for form in forms
        )
        assert all(torch.equal(first, other) for other in rest)


def test_samples_of_lists_and_dictionaries():
    images, boxes = [torch.zeros(3, 4, 5), torch.ones(3, 6, 7)], [{"box": 0}, {"box": 1}]
    parts = samples_of(as_batch((images, boxes)))
    assert [part.targets for part in parts] == [[{"box": 0}], [{"box": 1}]]
    assert [float(part.inputs.args[0][0].mean()) for part in parts] == [0, 1]
    parts = samples_of(as_batch(({"x": torch.arange(2)}, torch.ones(2))))
    assert [int(part.inputs.kwargs["x"]) for part in parts] == [0, 1]
    with pytest.raises(InputError, match="cannot be taken apart into 2 samples"):
        samples_of(as_batch(((torch.zeros(3, 3), torch.zeros(4)), torch.zeros(2))))


class Detector(nn.Module):
    """A list of images of different sizes, losses inside in training, as in torchvision."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = (
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, images, targets=None):
        maps = [self.norm(self.stem(image[None])).relu() for image in images]
        found = torch.cat([self.head(each).mean((2, 3)) for each in maps])
        if not self.training:
            return found
        wanted = torch.stack([target["box"] for target in targets])
        return {"box": F.mse_loss(found, wanted), "size": found.square().mean()}


def loss_inside(model, batch):
    losses = model(*batch.inputs.args, batch.targets)
    return sum(losses.values()), losses


@pytest.mark.parametrize("kind", [Taylor, OBD, GroupFisher])
def test_a_loss_inside_a_model_of_image_lists(kind):
    torch.manual_seed(0)
    model = Detector().eval()
    images = [torch.randn(3, size, 8) for size in (8, 10, 6)]
    batch = images, [{"box": torch.rand(4)} for _ in images]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    criterion = kind([batch], LossOfBatch(loss_inside))
    plan = sk.prune.plan(model, (images,), ratio=0.5, criterion=criterion)
    assert plan.kept["stem"] == (8, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training

    def outside(found, targets):
        wanted = torch.stack([target["box"] for target in targets])
        return F.mse_loss(found, wanted) + found.square().mean()

    other = sk.prune.plan(model, (images,), ratio=0.5, criterion=kind([batch], outside))
    assert other.edits == plan.edits


def test_scores_do_not_depend_on_the_device(batches, device):
    model = Net().eval()
    floats = [(images.float(), labels) for images, labels in batches]
    groups = groups_of(model, floats[0][0])
    for kind in (Taylor, OBD, GroupFisher):
        here = scores(kind(floats, F.cross_entropy), model, groups)
        there = scores(kind(floats, F.cross_entropy), copy.deepcopy(model).to(device), groups)
        for name in here:
            assert torch.allclose(here[name], there[name], rtol=1e-2, atol=1e-6)
