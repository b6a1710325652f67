"""Files of quantization plans: what does not hold together is refused before anything changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.errors import ArtifactError, PlanError


def _net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).eval()


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    x = torch.randn(4, 3, 8, 8)
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    sk.quantize.ptq(_net(), x, calibration=[x]).plan.save(path)
    data = json.loads(path.read_text())
    del data["sha256"]  # as if whoever changed it knew about it
    return json.dumps(data)


def _first(mapping):
    return mapping[next(iter(mapping))]


CHANGES = {
    "calls emptied": lambda plan: plan.update(calls={}),
    "a call emptied": lambda plan: _first(plan["calls"]).update(inputs={}, outputs={}),
    "calls as a list": lambda plan: plan.update(calls=[]),
    "quantizers emptied": lambda plan: plan.update(quantizers=[]),
    "a quantizer gone": lambda plan: plan["quantizers"].pop(),
    "a quantizer twice": lambda plan: plan["quantizers"].append(plan["quantizers"][0]),
    "a read of nothing": lambda plan: plan["decisions"][0].update(reads=["nowhere"]),
    "a weight of nothing": lambda plan: plan["decisions"][0].update(weight="nowhere"),
    "bits": lambda plan: plan["quantizers"][0]["form"].update(bits=99),
    "bits as text": lambda plan: plan["quantizers"][0]["form"].update(bits="8"),
    "a weight elsewhere": lambda plan: [q.update(parameter="9.weight") for q in plan["quantizers"]],
    "channels": lambda plan: [q.update(channels=3) for q in plan["quantizers"] if q["channels"]],
    "axis": lambda plan: [q.update(axis=7) for q in plan["quantizers"] if q["parameter"]],
    "a fold of nothing": lambda plan: plan.update(folds=[["0", "nowhere"]]),
    "a fold twice": lambda plan: plan.update(folds=[["0", "1"], ["0", "1"]]),
    "a fold of the wrong layer": lambda plan: plan.update(folds=[["4", "1"]]),
    "folds as text": lambda plan: plan.update(folds="01"),
    "a plain layer of nothing": lambda plan: plan.update(plain=["nowhere"]),
    "table": lambda plan: plan.update(table=3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_does_not_hold_together_is_refused_and_changes_nothing(held, tmp_path, name):
    data = json.loads(held)
    CHANGES[name](data["plan"])
    (tmp_path / "plan.json").write_text(json.dumps(data))
    net, x = _net(), torch.randn(2, 3, 8, 8)
    before, kinds, expected = net.state_dict(), [type(each) for each in net], net(x)
    with pytest.raises((PlanError, ArtifactError)):
        sk.apply(net, sk.Plan.load(tmp_path / "plan.json"))
    assert [type(each) for each in net] == kinds
    assert net.state_dict().keys() == before.keys()
    assert torch.equal(net(x), expected)


def test_the_unchanged_plan_fits(held, tmp_path):
    (tmp_path / "plan.json").write_text(held)
    assert sk.apply(_net(), sk.Plan.load(tmp_path / "plan.json")).plan.calls
