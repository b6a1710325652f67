"""Pruning in the middle of training: the next step is the one computed by hand."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import slimkit as sk
from slimkit.errors import InputError, PlanError

X = torch.zeros(1, 2, 8, 8)


class Net(nn.Module):
    """A convolution, a norm, a depthwise layer, and one weight under two names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv(x))))).mean(dim=(2, 3))
        return self.head(F.gelu(self.third(F.gelu(self.second(F.gelu(self.first(x)))))))


@pytest.fixture
def model():
    return Net()


@pytest.fixture
def batches():
    return [(torch.randn(6, 2, 8, 8), torch.randint(3, (6,))) for _ in range(4)]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    F.cross_entropy(model.train()(batch[0]), batch[1]).backward()
    optimizer.step()


def sliced(plan, name, tensor):
    for edit in plan.edits:
        if edit.tensor == name:
            tensor = tensor.index_select(edit.dim, torch.tensor(edit.keep))
    return tensor


def trained_and_pruned(model, optimizer, batches):
    """Train, prune → the plan, and weights and state as they were before."""
    for batch in batches[:-1]:
        step(model, optimizer, batch)
    names = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in names.items()}
    state = {name: copy.deepcopy(optimizer.state[p]) for name, p in names.items()}
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    assert {e.tensor for e in plan.edits} >= {"conv.weight", "conv.bias", "norm.weight"}
    assert sk.apply(model, plan, optimizer=optimizer) is model
    return plan, weights, state


def test_the_next_step_of_sgd_uses_the_momentum_that_stays(model, batches):
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    plan, weights, state = trained_and_pruned(model, optimizer, batches)
    step(model, optimizer, batches[-1])
    for name, parameter in model.named_parameters():
        weight = sliced(plan, name, weights[name])
        momentum = sliced(plan, name, state[name]["momentum_buffer"])
        momentum = 0.9 * momentum + parameter.grad + 0.01 * weight
        assert torch.allclose(parameter, weight - 0.1 * momentum, atol=1e-6), name


def test_the_next_step_of_adamw_uses_the_moments_that_stay(model, batches):
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    plan, weights, state = trained_and_pruned(model, optimizer, batches)
    step(model, optimizer, batches[-1])
    count = len(batches)  # the step count goes on
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        first = 0.9 * sliced(plan, name, state[name]["exp_avg"]) + 0.1 * gradient
        second = 0.999 * sliced(plan, name, state[name]["exp_avg_sq"]) + 0.001 * gradient**2
        scale = (second / (1 - 0.999**count)).sqrt() + 1e-8
        weight = sliced(plan, name, weights[name]) * (1 - 0.01 * 0.1)
        expected = weight - 0.01 * first / (1 - 0.9**count) / scale
        assert torch.allclose(parameter, expected, atol=1e-6), name


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: optim.Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (
            lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
            {"square_avg", "momentum_buffer", "grad_avg"},
        ),
        (lambda p: optim.SGD(p, momentum=0.9, nesterov=True, foreach=True), {"momentum_buffer"}),
        (lambda p: optim.AdamW(p, fused=True), {"exp_avg", "exp_avg_sq"}),
        (optim.Adagrad, {"sum"}),
    ],
)
def test_everything_of_the_shape_of_a_parameter_is_sliced(model, batches, make, keys):
    optimizer = make(model.parameters())
    plan, _, before = trained_and_pruned(model, optimizer, batches)
    parameters = dict(model.named_parameters())
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in parameters.values()
    ]
    assert optimizer.state.keys() == set(parameters.values())
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        assert {k for k, v in state.items() if torch.is_tensor(v) and v.dim()} == keys
        for key in keys:
            assert torch.equal(state[key], sliced(plan, name, before[name][key]))
        assert state.get("step") == before[name].get("step")
    assert model.second.weight is model.third.weight
    step(model, optimizer, batches[-1])
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_keep_their_settings_and_other_models_their_parameters(model, batches):
    other = nn.Linear(2, 2)
    spared = [p for p in model.parameters() if p.dim() == 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": spared, "weight_decay": 0.0},
        {"params": decayed, "lr": 0.5},
        {"params": list(other.parameters()), "lr": 0.25},
    ]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trained_and_pruned(model, optimizer, batches)
    first, second, third = optimizer.param_groups
    assert (first["lr"], first["weight_decay"], second["lr"]) == (0.1, 0.0, 0.5)
    assert [p.dim() for p in first["params"]] == [1] * len(spared)
    assert {id(p) for g in (first, second) for p in g["params"]} == set(map(id, model.parameters()))
    assert [id(p) for p in third["params"]] == [id(p) for p in other.parameters()]
    step(model, optimizer, batches[-1])
    schedule.step()
    assert second["lr"] == 0.25


def test_an_optimizer_that_never_stepped_has_nothing_to_slice(model, batches):
    optimizer = optim.AdamW(model.parameters())
    sk.apply(model, sk.prune.plan(model, X, ratio=0.5, round_to=1), optimizer=optimizer)
    assert not optimizer.state
    before = model.conv.weight.detach().clone()
    step(model, optimizer, batches[0])
    assert not torch.equal(model.conv.weight, before)


def test_momentum_keeps_the_layout_in_memory(model, batches):
    model = model.to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained_and_pruned(model, optimizer, batches)
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"]
    assert model.conv.weight.shape[0] == 4
    assert momentum.stride() == model.conv.weight.stride()
    assert momentum.is_contiguous(memory_format=torch.channels_last)


def test_the_optimizer_inside_of_accelerate_is_found(model, batches):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        wrapped = Accelerator(cpu=True).prepare(optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        assert not isinstance(wrapped, optim.SGD)
        plan, weights, state = trained_and_pruned(model, wrapped, batches)
        step(model, wrapped, batches[-1])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    momentum = sliced(plan, "conv.weight", state["conv.weight"]["momentum_buffer"])
    weight = sliced(plan, "conv.weight", weights["conv.weight"])
    expected = weight - 0.1 * (0.9 * momentum + model.conv.weight.grad)
    assert torch.allclose(model.conv.weight, expected, atol=1e-6)


def test_what_is_remembered_in_another_shape_starts_anew(model, batches):
    optimizer = optim.Adafactor(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match=r"Adafactor remembers .*conv.weight.* starts anew"):
        trained_and_pruned(model, optimizer, batches)
    assert model.conv.weight not in optimizer.state
    assert optimizer.state[model.conv.bias]["variance"].shape == (4,)
    step(model, optimizer, batches[-1])


def test_a_mistake_changes_neither_model_nor_optimizer(model, batches):
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)

    def fails(error, match, optimizer):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=match):
            sk.apply(model, plan, optimizer=optimizer)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    fails(InputError, "trains none of the parameters of this Net", optim.SGD(Net().parameters()))
    fails(InputError, "expected a torch.optim.Optimizer, got list", list(model.parameters()))
    fails(PlanError, "LBFGS", optim.LBFGS(model.parameters()))
    odd = optim.SGD(model.parameters())
    odd.state[model.conv.weight]["history"] = [torch.zeros(3)]
    fails(PlanError, "keeps a list for conv.weight as 'history'", odd)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sk.apply(model, plan, optimizer=optimizer)
    fails(PlanError, "applied to this model before", optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))


def test_plans_of_other_kinds_say_that_no_optimizer_follows(model):
    from slimkit.graph.folding import FusePlan

    optimizer = optim.SGD(model.parameters())
    with pytest.raises(PlanError, match="cannot follow a fuse plan"):
        sk.apply(model, object.__new__(FusePlan), optimizer=optimizer)


def test_training_on_after_pruning_equals_training_a_copy_with_state_put_in_by_hand(
    model, batches, device
):
    model = model.to(device)
    data = [(x.to(device), y.to(device)) for x, y in batches]
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    for batch in data[:2]:
        step(model, optimizer, batch)
    plan = sk.prune.plan(model, X, ratio=0.5, round_to=1)
    twin = sk.apply(copy.deepcopy(model), plan)
    own = optim.AdamW(twin.parameters(), lr=0.01)
    names = [name for name, _ in model.named_parameters()]
    saved = copy.deepcopy(optimizer.state_dict())
    for number, entry in saved["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = sliced(plan, names[number], entry[key].cpu()).to(device)
    own.load_state_dict(saved)
    sk.apply(model, plan, optimizer=optimizer)
    for batch in data[2:]:
        step(model, optimizer, batch)
        step(twin, own, batch)
    assert math.prod(model.conv.weight.shape) < 8 * 2 * 9
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.apply(model, sk.prune.plan(model, X, ratio=0.5, round_to=1), optimizer=optimizer)
