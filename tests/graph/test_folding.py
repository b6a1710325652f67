from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import get_model

import slimkit as sk
from slimkit.errors import PlanError
from slimkit.graph import FusePlan, batch_norm_pairs, capture


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms that do something: random statistics and affine parameters."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                tensor.data.normal_(0, 0.2, generator=generator)
            for tensor in (module.running_var, module.weight):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("name", "folded", "left"), [("resnet18", 20, 0), ("mobilenet_v2", 52, 0)])
def test_every_batch_norm_behind_a_convolution_folds(name: str, folded: int, left: int) -> None:
    model = randomise(get_model(name))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    plan = FusePlan(tuple(batch_norm_pairs(model, capture(model, x))))
    assert len(plan.pairs) == folded
    sk.apply(model, plan)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == left
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_pre_activation_batch_norms_are_left_alone() -> None:
    model = randomise(get_model("densenet121"))
    x = torch.randn(1, 3, 64, 64)
    pairs = batch_norm_pairs(model, capture(model, x))
    # norm1 of a dense layer reads concatenated features: only the stem and norm2 fold.
    assert len(pairs) == 1 + 58
    assert ("features.conv0", "features.norm0") in pairs
    assert all(norm.endswith(("norm0", "norm2")) for _, norm in pairs)
    expected = model(x)
    torch.testing.assert_close(
        sk.apply(model, FusePlan(tuple(pairs)))(x), expected, atol=1e-5, rtol=1e-5
    )


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(6)
        self.read_twice = nn.Conv2d(6, 6, 1)
        self.twice_norm = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 1)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.no_statistics = nn.Conv2d(6, 6, 1)
        self.batch_only = nn.BatchNorm2d(6, track_running_stats=False)
        self.linear = nn.Linear(6, 5, bias=False)
        self.linear_norm = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up_norm(self.up(x))
        y = self.read_twice(x)
        x = self.twice_norm(y) + y
        x = self.second(self.shared(self.first(self.shared(x))))
        x = self.batch_only(self.no_statistics(x))
        return self.linear_norm(self.linear(x.mean((2, 3))))


def test_only_what_is_used_once_and_alone_is_folded() -> None:
    model = randomise_shapes()
    x = torch.randn(2, 4, 3, 3)
    expected = model(x)
    pairs = batch_norm_pairs(model, capture(model, x))
    assert pairs == [("up", "up_norm"), ("linear", "linear_norm")]
    torch.testing.assert_close(sk.apply(model, FusePlan(tuple(pairs)))(x), expected)


def randomise_shapes() -> nn.Module:
    model = Shapes()
    for module in (model.up_norm, model.linear_norm):
        randomise(module)
    return model.eval()


class NormAndActivation(nn.BatchNorm2d):
    """As in timm: the batch norm applies the activation function too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class NormAndMore(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_the_activation_inside_a_batch_norm_stays() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4), nn.Conv2d(4, 2, 1)))
    x = 4 * torch.randn(2, 3, 8, 8)
    expected = model(x)
    plan = FusePlan(tuple(batch_norm_pairs(model, capture(model, x))))
    assert plan.pairs == (("0", "1"),)
    torch.testing.assert_close(sk.apply(model, plan)(x), expected, atol=1e-5, rtol=1e-5)
    assert list(dict(model.named_modules())) == ["", "0", "1", "1.drop", "1.act", "2"]
    other = nn.Sequential(nn.Conv2d(3, 4, 3), NormAndMore(4)).eval()
    assert batch_norm_pairs(other, capture(other, x)) == []


def test_a_folded_model_is_saved_and_loaded(tmp_path) -> None:
    model = randomise(get_model("resnet18", num_classes=5))
    x = torch.randn(1, 3, 32, 32)
    fresh = copy.deepcopy(model)
    sk.apply(model, FusePlan(tuple(batch_norm_pairs(model, capture(model, x)))))
    sk.save(model, tmp_path / "model")
    torch.nn.init.zeros_(fresh.fc.weight)
    loaded = sk.load(tmp_path / "model", model=fresh)
    torch.testing.assert_close(loaded.eval()(x), model(x))


def test_a_plan_for_another_model_changes_nothing() -> None:
    model = randomise_shapes()
    before = copy.deepcopy(model.state_dict())
    plan = FusePlan((("up", "up_norm"), ("linear", "linear_nrom")))
    with pytest.raises(PlanError, match="linear_norm"):
        sk.apply(model, plan)
    with pytest.raises(PlanError, match="5 channels"):
        sk.apply(model, FusePlan((("up", "up_norm"), ("shared", "linear_norm"))))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class NormThenAct(nn.BatchNorm2d):
    """As timm's: an activation function lives inside the batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


class ActThenNorm(NormThenAct):
    """The other way round: the children alone do not say what it does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x)) - 1


@pytest.mark.parametrize(("norm", "folds"), [(NormThenAct, 1), (ActThenNorm, 0)])
def test_what_else_a_batch_norm_does_is_kept(norm: type[NormThenAct], folds: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 2, 1))
    model[1].weight.data.uniform_(3, 9)
    model[1].running_var.uniform_(0.2, 3)
    model.eval()
    x = 4 * torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert expected.abs().max() > 0.1
    pairs = batch_norm_pairs(model, capture(model, x))
    assert len(pairs) == folds
    folded = FusePlan(tuple(pairs)).apply_to(model)
    assert torch.allclose(folded(x), expected, atol=1e-5)
    assert not folds or isinstance(folded[1].act, nn.ReLU6)
