"""Folding batch norms into a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimkit as sk
from slimkit.errors import CaptureError, InputError
from slimkit.reparam import fuse


class Residual(nn.Module):
    """One foldable pair, one linear pair, and a batch norm that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.bn3 = nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.bn1(self.conv1(images)).relu()
        branch = self.conv2(stem)
        both = self.bn2(branch) + branch  # bn2 is not the only reader of conv2
        return self.bn3(self.fc(both.mean((2, 3))))


def trained(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts as after training."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.uniform_(-1, 1, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.weight.data.uniform_(-2, 2, generator=generator)
            layer.bias.data.uniform_(-1, 1, generator=generator)
    return model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return trained(Residual())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_copy_computes_the_same(model: nn.Module, images: Tensor) -> None:
    folded = fuse(model, images)
    assert torch.allclose(folded(images), model.eval()(images), atol=1e-5, rtol=1e-4)


def test_only_norms_that_own_their_input_are_folded(model: nn.Module, images: Tensor) -> None:
    folded = fuse(model, images)
    left = [name for name, layer in folded.named_modules() if "BatchNorm" in type(layer).__name__]
    assert left == ["bn2"]


def test_the_argument_is_not_changed(model: nn.Module, images: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    folded = fuse(model.train(), images)
    assert not folded.training
    assert all(layer.training for layer in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_example_inputs_are_guessed_for_image_models(model: nn.Module, images: Tensor) -> None:
    assert torch.allclose(fuse(model)(images), fuse(model, images)(images))


def test_a_reference_network_loses_all_its_norms() -> None:
    model = trained(sk.build_model("slimkit:resnet20", num_classes=4)).eval()
    folded = fuse(model)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    expected = model(images)
    assert torch.allclose(
        folded(images), expected, atol=1e-4 * float(expected.detach().abs().max())
    )


def test_a_folded_model_is_saved_with_its_plan(
    model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    folded = fuse(model, images)
    sk.save(folded, tmp_path / "model")
    loaded = sk.load(tmp_path / "model", model=Residual()).eval()
    assert torch.equal(loaded(images), folded(images))


def test_a_model_without_norms_is_copied(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    folded = fuse(model, images)
    assert folded is not model
    assert torch.equal(folded(images), model(images))


def test_inputs_that_cannot_be_guessed_are_asked_for() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a + b)

    with pytest.raises(InputError, match=r"example_inputs.*1×3"):
        fuse(Two())


def test_inputs_that_do_not_fit_are_an_error(model: nn.Module) -> None:
    with pytest.raises(CaptureError):
        fuse(model, torch.zeros(1, 5, 8, 8))
