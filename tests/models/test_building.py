"""Models are found by name, and mistakes in the name are explained."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit.errors import ModelError, SlimkitError, UnknownNameError
from slimkit.models import MODELS, build_model, list_models


@pytest.fixture
def own_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("my_networks")
    module.tiny = lambda width=4: nn.Linear(width, 2)  # type: ignore[attr-defined]
    module.wrong = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_networks", module)
    return module


def test_torchvision_models_are_built_untrained_with_their_arguments() -> None:
    torch.manual_seed(1)
    model = sk.build_model("torchvision:mobilenet_v3_small", num_classes=7).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_own_factory_is_imported_and_called(own_module: types.ModuleType) -> None:
    model = build_model("my_networks:tiny", width=6)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 6


def test_registered_factory_has_a_short_name() -> None:
    with MODELS.scratch():
        MODELS.register("one_layer")(lambda: nn.Linear(1, 1))
        assert isinstance(build_model("slimkit:one_layer"), nn.Linear)
        assert "slimkit:one_layer" in list_models()


@pytest.mark.parametrize(
    ("name", "kwargs", "kind", "says"),
    [
        ("slimkit:resnet21", {}, UnknownNameError, "resnet20"),
        ("torchvision:resnet19", {}, UnknownNameError, "resnet18"),
        ("resnet20", {}, ModelError, "slimkit:resnet20"),
        ("slimkit:resnet20", {"classes": 3}, ModelError, "classes=3"),
        ("my_networks:tinny", {}, UnknownNameError, "tiny"),
        ("my_networks:wrong", {}, ModelError, "int"),
        ("no_such_package:thing", {}, UnknownNameError, "no_such_package"),
    ],
)
def test_mistakes_name_the_nearest_choice(
    own_module: types.ModuleType, name: str, kwargs: dict[str, int], kind: type, says: str
) -> None:
    with pytest.raises(SlimkitError, match=says) as caught:
        build_model(name, **kwargs)
    assert isinstance(caught.value, kind)


def test_unknown_source_of_models_is_refused() -> None:
    with pytest.raises(ModelError, match="torchvision"):
        list_models("torchvison")
