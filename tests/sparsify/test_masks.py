"""Masks are a plan: saved, loaded, explained, replayed, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.errors import ArtifactError, PlanError, SlimkitError


def network(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 1)
    )


def test_a_plan_sets_exactly_its_zeros_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model = network()
    plan = sk.sparsify.plan(model, sparsity=0.7)
    plan.save(tmp_path / "plan.json")
    again = sk.Plan.load(tmp_path / "plan.json")
    assert isinstance(again, sk.sparsify.MaskPlan)
    assert again.to_json() == plan.to_json()
    sk.apply(model, again)
    for name, mask in plan.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert "zero of" in again.explain()
    assert "1.weight" not in again.explain()


def test_a_saved_sparse_network_loads_with_its_zeros(tmp_path: Path) -> None:
    model = network()
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.7))
    sk.save(model, tmp_path / "model")
    again = sk.load(tmp_path / "model", model=network())
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert [type(plan).__name__ for plan in sk.plan.applied_plans(again)] == ["MaskPlan"]


def test_channels_of_a_sparse_network_are_pruned_and_it_loads(tmp_path: Path) -> None:
    model = network().eval()
    x = torch.randn(2, 3, 8, 8)
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.7))
    sk.apply(model, sk.prune.plan(model, x, ratio=0.5, round_to=1))
    sk.save(model, tmp_path / "model")
    again = sk.load(tmp_path / "model", model=network().eval())
    assert torch.equal(again.eval()(x), model(x))


@pytest.mark.parametrize("other", [network(16), nn.Sequential(nn.Conv2d(3, 4, 3))])
def test_masks_that_do_not_fit_change_nothing(other: nn.Module) -> None:
    plan = sk.sparsify.plan(network(), sparsity=0.7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(PlanError):
        sk.apply(other, plan)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan["weights"].pop("3.weight") and None,
        lambda plan: plan["weights"]["3.weight"].update(nonzero=1),
        lambda plan: plan["weights"]["3.weight"].update(shape=[5, 12]),
        lambda plan: plan["weights"]["3.weight"].update(shape=[10**9, 12]),
        lambda plan: plan["weights"]["3.weight"].update(shape=[-5, -12]),
        lambda plan: plan["weights"].update(other={"shape": [1, 1], "nonzero": 1}),
        lambda plan: plan.pop("weights") and None,
    ],
)
def test_a_changed_plan_is_refused(tmp_path: Path, damage: object) -> None:
    sk.sparsify.plan(network(), sparsity=0.7).save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    damage(content["plan"])  # type: ignore[operator]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SlimkitError):
        sk.Plan.load(tmp_path / "plan.json")
    content.pop("sha256")
    (tmp_path / "plan.json").write_text(json.dumps(content))
    try:
        plan = sk.Plan.load(tmp_path / "plan.json")
        with pytest.raises(SlimkitError):  # what it says now is another plan, but a sound one
            sk.apply(network(3), plan)
    except (PlanError, ArtifactError):
        pass


def test_a_network_beside_it_follows(tmp_path: Path) -> None:
    model, teacher = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plan = sk.sparsify.plan(model, sparsity=0.7)
    sk.apply(model, plan, optimizer=optimizer, companions=[teacher])
    assert torch.equal(teacher[3].weight, model[3].weight)
