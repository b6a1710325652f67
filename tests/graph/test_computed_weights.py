"""Layers that compute their weight from parameters become plain layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import slimkit as sk
from slimkit.errors import PlanError
from slimkit.graph.capturing import capture
from slimkit.graph.computed_weights import SamePadConv2d, computed_weights, make_plain
from slimkit.graph.folding import batch_norm_pairs


class StandardisedConv(nn.Conv2d):
    """Zero mean and unit variance per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return F.conv2d(
            self.pad(x), flat.view_as(self.weight), self.bias, self.stride, self.padding
        )

    def pad(self, x: Tensor) -> Tensor:
        return x


class PaddedConv(StandardisedConv):
    """Pads with ones: no plain convolution does."""

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1), value=1.0)


class SamePadded(StandardisedConv):
    """As many outputs as inputs over stride, by zeros in front and more of them behind."""

    def pad(self, x: Tensor) -> Tensor:
        rest = x.shape[-1] % 2
        return F.pad(x, (rest, 1, rest, 1))


class FollowsInput(nn.Linear):
    """Its weight depends on its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * x.mean(), self.bias)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = StandardisedConv(3, 8, 3, stride=2, padding=1)
        self.same = SamePadded(8, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.body = weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.padded = PaddedConv(8, 8, 2)
        self.turn = spectral_norm(nn.Linear(8, 8))
        self.own = FollowsInput(8, 8)
        self.head = nn.Linear(8, 4)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.same(x))
        x = torch.relu(self.padded(torch.relu(self.body(x)))).mean((2, 3))
        return self.head(self.own(torch.relu(self.turn(x))))


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_those_that_depend_on_parameters_alone_become_plain(net: nn.Module, x: Tensor) -> None:
    paths = computed_weights(net, capture(net, x))
    assert paths == ("stem", "same", "body", "turn")
    plain = make_plain(copy.deepcopy(net), paths)
    assert type(plain.stem) is nn.Conv2d
    assert type(plain.same) is SamePadConv2d
    assert type(plain.turn) is nn.Linear
    torch.testing.assert_close(plain(x), net(x))
    assert computed_weights(plain, capture(plain, x)) == ()


def test_no_batch_norm_is_folded_into_what_would_undo_it(net: nn.Module, x: Tensor) -> None:
    assert batch_norm_pairs(net, capture(net, x)) == []
    torch.testing.assert_close(sk.reparam.fuse(net, x)(x), net(x))


def test_a_plan_for_another_network_changes_nothing(net: nn.Module) -> None:
    with pytest.raises(PlanError, match="no such module") as caught:
        make_plain(net, ["stem", "bodi"])
    assert caught.value.hint == "did you mean 'body'?"
    with pytest.raises(PlanError, match="PaddedConv is no layer with a weight of its own"):
        make_plain(net, ["stem", "padded"])
    assert type(net.stem) is StandardisedConv


def test_they_are_quantized_exported_and_loaded(net: nn.Module, x: Tensor, tmp_path: Path) -> None:
    q = sk.quantize.ptq(net, x, calibration=[x])
    assert q.plan.plain == ("stem", "same", "body", "turn")
    assert q.plan.folds == (("stem", "norm"),)
    integer = {d.module for d in q.plan.decisions if d.integer and d.weight}
    assert {"stem", "same", "body", "turn", "head"} <= integer
    assert "computed weights became parameters: stem, same, body, turn" in q.plan.explain()
    with torch.no_grad():
        expected = q(x)
    assert (expected - net(x)).square().mean() < 1e-2 * net(x).square().mean()
    sk.save(q, tmp_path / "saved")
    again = sk.load(tmp_path / "saved", model=net)
    with torch.no_grad():
        assert torch.equal(again(x), expected)
    sk.export(q, tmp_path / "q.onnx", x)
    (found,) = sk.runtime.open_session(tmp_path / "q.onnx").run([x.numpy()])
    one_step = torch.from_numpy(found) - expected  # where two ways of summing round apart
    assert one_step.square().mean() < 1e-3 * expected.square().mean()
