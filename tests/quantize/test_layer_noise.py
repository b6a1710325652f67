"""The facts that a report shows of the rounding of each layer."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.quantize import ptq
from slimkit.quantize.outputs.layer_noise import layer_noise

Images = Callable[..., Tensor]


def test_the_numbers_are_those_of_the_two_networks(small: nn.Module, images: Images) -> None:
    x = images(8)
    q = ptq(small, x, calibration=x)
    facts = layer_noise(q, sk.Inputs((x,)), original=small)
    rows = {row["layer"]: row for row in facts["layers"]}
    assert list(rows) == ["conv1", "depthwise", "pointwise", "branch", "fc"]
    with torch.no_grad():
        before, after = small(x).double(), q(x).double()
        noise = (after - before).square().sum() / before.square().sum()
        weight = q.model.get_parameter("fc.weight")
        error = (q.quantizers["fc_weight"](weight) - weight).double().square().sum()
    assert rows["fc"]["sqnr_db"] == pytest.approx(-10 * float(noise.log10()), abs=0.02)
    expected = 10 * float((weight.detach().double().square().sum() / error).log10())
    assert rows["fc"]["weight_sqnr_db"] == pytest.approx(expected, abs=0.02)
    assert rows["fc"]["output_sqnr_db"] is None  # it leaves in float
    assert layer_noise(q, sk.Inputs((x,)))["layers"][-1] == rows["fc"]


def test_the_poisoned_layer_is_pictured_first(poisoned: nn.Module, images: Images) -> None:
    x = images(8)
    q = ptq(poisoned, x, calibration=x, granularity="tensor", methods=[])
    facts = layer_noise(q, sk.Inputs((x,)), original=poisoned, pictured=2)
    first, second = facts["histograms"]
    assert first["layer"] == "pointwise"
    for picture in (first, second):
        for kind in ("weights", "outputs"):
            counts = picture[kind]
            assert len(counts["before"]) == len(counts["after"]) <= 64
            assert sum(counts["before"]) == sum(counts["after"])
            assert counts["low"] < counts["high"]
    assert sum(first["weights"]["before"]) == 16 * 16
    assert len(json.dumps(facts)) < 8000


def test_nothing_is_changed(small: nn.Module, images: Images) -> None:
    x = images(4)
    q = sk.quantize.qat(small, x, calibration=x)
    state = {name: value.clone() for name, value in q.state_dict().items()}
    with torch.no_grad():
        expected = q.eval()(x)
    q.train()
    layer_noise(q, sk.Inputs((x,)))
    assert q.training
    assert all(torch.equal(state[name], value) for name, value in q.state_dict().items())
    with torch.no_grad():
        assert torch.equal(q.eval()(x), expected)
