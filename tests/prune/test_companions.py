"""Masks, averages, second networks and objects of one's own go on with a pruned network."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import slimkit as sk
from slimkit.errors import InputError, PlanError, SlimkitError
from slimkit.graph.folding import FusePlan
from slimkit.plan import Plan
from slimkit.train import WeightAverage

X = torch.randn(2, 2, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.third = nn.Conv2d(8, 8, 1, bias=False)
        self.third.weight = self.second.weight
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.third(F.relu(self.second(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def prune_plan(model: nn.Module) -> sk.prune.PrunePlan:
    return sk.prune.plan(model, X, ratio=0.5, round_to=1)


def train(model: nn.Module, *averages: Any) -> None:
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(torch.randn(4, 2, 8, 8)).square().sum().backward()
        optimizer.step()
        for average in averages:
            average.update() if isinstance(average, WeightAverage) else average.update_parameters(
                model
            )


def by_hand(plan: sk.prune.PrunePlan, name: str, tensor: Tensor) -> Tensor:
    for edit in plan.edits:
        if edit.tensor == name and tensor.shape[edit.dim] > 1:
            tensor = tensor.index_select(edit.dim, torch.tensor(edit.keep))
    return tensor


def test_masks_are_sliced_like_their_parameters(model: Net) -> None:
    masks = {name: (torch.rand_like(p) > 0.5).float() for name, p in model.named_parameters()}
    masks["third.weight"] = masks["second.weight"].clone()  # the other name of a tied one
    masks["conv.weight"] = (torch.rand(8, 1, 1, 1) > 0.5).float()  # a scale per channel, as well
    before = {name: mask.clone() for name, mask in masks.items()}
    plan = prune_plan(model)
    sk.apply(model, plan, companions=[masks])
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        first = "second.weight" if name == "third.weight" else name
        assert torch.equal(mask, by_hand(plan, first, before[name])), name
        assert (named[name].detach() * mask).shape == named[name].shape
    assert masks["conv.weight"].shape == (4, 1, 1, 1)
    assert masks["third.weight"].shape == (4, 4, 1, 1)


def test_a_weight_average_goes_on_as_if_the_rest_had_never_been_there(model: Net) -> None:
    average = WeightAverage(model, 0.9)
    train(model, average)
    before = {name: tensor.clone() for name, tensor in average.average.items()}
    plan = prune_plan(model)
    sk.apply(model, plan, companions=average)
    for name, tensor in before.items():
        assert torch.equal(average.average[name], by_hand(plan, name, tensor)), name
    kept = {name: tensor.clone() for name, tensor in average.average.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    steps = average.steps
    average.update()
    decay = min(0.9, (1 + steps) / (10 + steps))
    expected = decay * kept["fc.weight"] + (1 - decay) * model.fc.weight.detach()
    assert torch.allclose(average.average["fc.weight"], expected, atol=1e-6)
    average.copy_to_model()
    assert torch.equal(model.norm.running_mean, average.average["norm.running_mean"])


def test_networks_of_the_same_structure_get_the_plan_too(model: Net) -> None:
    averaged, twin = AveragedModel(model), copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = optim.AdamW(twin.parameters())
    train(model, averaged)
    plan = prune_plan(model)
    sk.apply(model, plan, optimizer=optimizer, companions=[averaged, twin, optimizer, twin])
    assert averaged.module.conv.weight.shape == twin.conv.weight.shape == (4, 2, 3, 3)
    assert sk.plan.applied_plans(twin) == [plan]
    averaged.update_parameters(model)
    assert averaged(X).shape == twin(X).shape == (2, 3)
    assert optimizer.param_groups[0]["params"][0] is model.conv.weight
    assert other.param_groups[0]["params"][0] is not twin.conv.weight  # of another network


class Scores:
    """Something of a user's that is made for a network."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = {name: p.detach().abs() for name, p in model.named_parameters()}
        self.told: list[str] = []

    def follow(self, plan: Plan) -> Callable[[nn.Module], None]:
        sliced = {name: plan.slice_state(name, norm) for name, norm in self.norms.items()}

        def go_on(model: nn.Module) -> None:
            self.norms = sliced
            self.told.append(type(model).__name__)

        return go_on


def test_an_object_of_ones_own_follows_by_one_method(model: Net) -> None:
    scores = Scores(model)
    sk.apply(model, prune_plan(model), companions=[scores])
    assert scores.told == ["Net"]
    for name, parameter in model.named_parameters():
        assert torch.equal(scores.norms[name], parameter.detach().abs())


class Refuses:
    def follow(self, plan: Plan) -> Callable[[nn.Module], None]:
        raise PlanError("not with me", where="mine")


class Forgets:
    def follow(self, plan: Plan) -> None:
        return None


WRONG: dict[str, tuple[Callable[[Net], Any], type[SlimkitError], str]] = {
    "refusal": (lambda model: Refuses(), PlanError, "^mine: not with me"),
    "nothing returned": (lambda model: Forgets(), InputError, r"companions\.3: Forgets\.follow"),
    "no companion": (lambda model: "masks", InputError, r"companions\.3: str is nothing that"),
    "the model": (lambda model: model, InputError, r"companions\.3: this is the model itself"),
    "unknown name": (
        lambda model: {"conv.weigth": torch.ones(8, 2, 3, 3)},
        PlanError,
        r"companions\.3\.conv\.weigth: .*did you mean 'conv\.weight'",
    ),
    "other shape": (
        lambda model: {"conv.weight": torch.ones(8, 2, 5, 5)},
        PlanError,
        r"companions\.3\.conv\.weight: expected a tensor of shape \(8, 2, 3, 3\), got shape",
    ),
    "no tensor": (lambda model: {"conv.weight": 1}, PlanError, "got <class 'int'>"),
    "cannot be changed": (
        lambda model: types.MappingProxyType({"conv.weight": torch.ones(8, 2, 3, 3)}),
        InputError,
        "cannot be replaced",
    ),
    "another structure": (
        lambda model: nn.Sequential(nn.Linear(2, 2)),
        PlanError,
        r"companions\.3\..*which this Sequential does not have",
    ),
    "average of another": (
        lambda model: WeightAverage(nn.Linear(2, 2), 0.9),
        PlanError,
        "the model that is averaged has no",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_nothing_changes_if_one_of_them_cannot_follow(model: Net, case: str) -> None:
    make, error, message = WRONG[case]
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average, twin = WeightAverage(model, 0.9), Net()
    masks = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    held = [model.state_dict(), twin.state_dict(), average.average, masks]
    before = [{name: (id(t), t.clone()) for name, t in each.items()} for each in held]
    plan = prune_plan(model)
    with pytest.raises(error, match=message):
        sk.apply(model, plan, optimizer=optimizer, companions=[average, masks, twin, make(model)])
    now = [model.state_dict(), twin.state_dict(), average.average, masks]
    for old, new in zip(before, now, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(tensor, new[name]) for name, (_, tensor) in old.items())
    assert optimizer.param_groups[0]["params"][0] is model.conv.weight
    assert sk.plan.applied_plans(model) == []


def test_plans_that_slice_nothing_are_followed_by_nobody(model: Net) -> None:
    plan = object.__new__(FusePlan)
    with pytest.raises(PlanError, match="dict cannot follow a fuse plan"):
        sk.apply(model, plan, companions=[{}])
    with pytest.raises(PlanError, match="a fuse plan slices no tensors"):
        sk.apply(model, plan, companions=[WeightAverage(model, 0.9)])
