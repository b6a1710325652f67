"""What may stand between two layers, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from slimkit.distill import CONNECTORS, Distiller, Mimic, parse_losses
from slimkit.distill.losses.connectors import connect
from slimkit.distill.losses.projection import seeded
from slimkit.errors import ModelError, RecipeError, SlimkitError, UnknownNameError

MAPS, BIGGER, VECTORS = (2, 4, 6, 6), (2, 8, 3, 3), (2, 8)


def read(choice: Any) -> Any:
    """A connector as a recipe gives it."""
    (loss,) = parse_losses([{"type": "mimic", "student": "a", "connector": choice}])
    assert isinstance(loss, Mimic)
    return loss.connector


def module(choice: Any, student: Any = MAPS, teacher: Any = BIGGER) -> nn.Module:
    built = connect(read(choice), student, teacher, where="layer1")
    assert built is not None
    return built


@pytest.mark.parametrize(
    ("choice", "teacher"),
    [
        ("auto", BIGGER),
        ("conv1x1", BIGGER),
        ("conv_bn_act", BIGGER),
        ({"type": "conv_bn_act", "kernel": 3, "norm": False, "act": "gelu"}, BIGGER),
        ("linear", VECTORS),
        ("resize", (2, 4, 3, 3)),
        (["resize", "conv1x1", {"type": "normalize", "kind": "batch_norm"}], BIGGER),
        ([{"type": "function", "function": "relu"}, "conv1x1"], BIGGER),
        ({"type": "module", "module": "MaxPool2d", "args": {"kernel_size": 2}}, (2, 4, 3, 3)),
        (
            {"type": "module", "module": "torch.nn:Conv2d",
             "args": {"in_channels": 4, "out_channels": 8, "kernel_size": 2, "stride": 2}},
            BIGGER,
        ),
        (
            [{"type": "function", "function": "torch.nn.functional:adaptive_avg_pool2d",
              "args": {"output_size": 1}},
             {"type": "function", "function": "flatten", "args": {"start_dim": 1}},
             "linear"],
            VECTORS,
        ),
    ],
)  # fmt: skip
def test_a_connector_leads_to_the_teachers_shape(choice: Any, teacher: tuple[int, ...]) -> None:
    built = module(choice, MAPS, teacher)
    features = torch.randn(MAPS, requires_grad=True)
    outputs = built(features)
    assert tuple(outputs.shape) == teacher
    outputs.square().sum().backward()
    assert features.grad is not None


def test_equal_shapes_need_nothing() -> None:
    assert connect("auto", MAPS, MAPS, where="a") is None
    assert connect("none", MAPS, BIGGER, where="a") is None


@pytest.mark.parametrize("kind", ["l2", "standardize", "batch_norm"])
def test_normalisers_normalise(kind: str) -> None:
    maps = 3 * torch.randn(8, 4, 5, 5) + 2
    out: Tensor = module({"type": "normalize", "kind": kind}, maps.shape, maps.shape)(maps)
    if kind == "l2":
        assert torch.allclose(out.norm(dim=1), torch.ones(8, 5, 5), atol=1e-5)
    else:
        rows = out.transpose(0, 1).flatten(1)
        assert torch.allclose(rows.mean(1), torch.zeros(4), atol=1e-5)
        assert torch.allclose(rows.var(1, unbiased=False), torch.ones(4), atol=1e-3)


def test_building_draws_nothing_from_the_global_random_state() -> None:
    choice = {"type": "module", "module": "Linear", "args": {"in_features": 3, "out_features": 2}}
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        built = [module(c) for c in (choice, "conv_bn_act")]
        assert torch.equal(before, torch.get_rng_state())
        weights.append([p for m in built for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_random_state_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded():
        nn.Linear(3, 2)(torch.rand(1, 4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_every_connector_is_described(name: str) -> None:
    settings = CONNECTORS.get(name)
    assert issubclass(settings, BaseModel)
    assert settings.model_fields["type"].default == name
    assert (settings.__doc__ or "").strip()


def test_a_recipe_reads_back_the_connector_it_wrote() -> None:
    for choice in (
        "auto",
        "conv1x1",
        {"type": "conv_bn_act", "kernel": 3, "norm": True, "act": "none"},
        ["resize", {"type": "normalize", "kind": "l2"}],
    ):
        (loss,) = parse_losses([{"type": "mimic", "student": "a", "connector": choice}])
        assert loss.model_dump(mode="json")["connector"] == choice
        assert parse_losses([loss.model_dump(mode="json")]) == [loss]


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, width, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def test_a_connectors_statistics_are_part_of_the_checkpoint() -> None:
    images = torch.randn(4, 3, 6, 6)
    loss = {"type": "mimic", "student": "body", "connector": "conv_bn_act"}
    student = Net(4)
    with Distiller(student, Net(8), [loss], example_inputs=images) as distiller:
        key = "connectors.0.project.1.running_mean"
        assert not distiller.state_dict()[key].any()  # a look at shapes moves nothing
        distiller.loss(images, student(images))
        assert distiller.state_dict()[key].any()
        assert distiller.connectors.training


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ("conv1x", ["0.connector", "'conv1x1'"]),
        ("atuo", ["0.connector", "'auto'"]),
        ("module", ["0.connector", "needs module", "{type: module, module: …}"]),
        ({"type": "conv_bn"}, ["0.connector.type", "'conv_bn_act'"]),
        ({"type": "conv_bn_act", "act": "rely"}, ["0.connector.act", "'relu'"]),
        ({"type": "conv_bn_act", "krnel": 3}, ["0.connector.krnel"]),
        ([], ["0.connector", "no connector"]),
        (3, ["0.connector", "expected a connector"]),
        (["none"], ["0.connector", "'none'"]),
    ],
)
def test_mistakes_name_their_path(choice: Any, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read(choice)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "student", "teacher", "error", "words"),
    [
        ("linear", MAPS, BIGGER, ModelError, "leads to vectors"),
        ("resize", VECTORS, BIGGER, ModelError, "joins maps"),
        ({"type": "conv_bn_act", "kernel": 2}, MAPS, BIGGER, ModelError, "kernel 2 is even"),
        ({"type": "module", "module": "Conv2e"}, MAPS, BIGGER, UnknownNameError, "'Conv2d'"),
        ({"type": "module", "module": "Conv2d"}, MAPS, BIGGER, ModelError, "cannot be built"),
        ({"type": "module", "module": "torch:zeros", "args": {"size": [1]}}, MAPS, BIGGER,
         ModelError, "no module"),
        ({"type": "function", "function": "torch:float32"}, MAPS, BIGGER, SlimkitError, "called"),
        (["linear", "conv1x1"], (2, 4), (2, 8, 3, 3), ModelError, "leads to vectors"),
        ([{"type": "module", "module": "Linear", "args": {"in_features": 3, "out_features": 3}},
          "conv1x1"], MAPS, BIGGER, ModelError, "a connector fails on"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_said(
    choice: Any, student: Any, teacher: Any, error: type[SlimkitError], words: str
) -> None:
    with pytest.raises(error, match="layer1") as caught:
        connect(read(choice), student, teacher, where="layer1")
    assert words in str(caught.value)
