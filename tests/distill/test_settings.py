"""Distillation losses named in a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from slimkit.distill import DIST, DISTILL_LOSSES, KD, DistillLoss, Mimic, parse_losses
from slimkit.errors import RecipeError, SlimkitError, UnknownNameError


class Absolute(DistillLoss):
    type: Literal["absolute"] = "absolute"

    def compute(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).abs().mean()


@pytest.fixture
def registered() -> Iterator[None]:
    with DISTILL_LOSSES.scratch():
        DISTILL_LOSSES.register("absolute")(Absolute)
        yield


def test_a_recipe_names_losses_by_type() -> None:
    losses = parse_losses(
        [
            {"type": "kd", "temperature": 2, "weight": 0.5},
            {"type": "dist"},
            {"type": "mimic", "student": "layer3"},
        ]
    )
    assert losses == [KD(temperature=2, weight=0.5), DIST(), Mimic(student="layer3")]


def test_the_teachers_layer_is_the_students_unless_given() -> None:
    assert Mimic(student="layer3").teacher_layer == "layer3"
    assert Mimic(student="layer3", teacher="stage3").teacher_layer == "stage3"
    assert KD().teacher_layer is None


@pytest.mark.usefixtures("registered")
def test_a_loss_of_ones_own_is_named_like_a_built_in_one() -> None:
    (loss,) = parse_losses([{"type": "absolute", "weight": 3}])
    assert isinstance(loss, Absolute)
    assert loss.weight == 3
    assert loss.compute(torch.tensor([1.0]), torch.tensor([3.0])).item() == 2


def test_a_loss_is_found_by_import_reference() -> None:
    (loss,) = parse_losses([{"type": "slimkit.distill.losses.catalogue:KD", "temperature": 3}])
    assert loss == KD(temperature=3)


@pytest.mark.parametrize(
    ("entries", "error", "parts"),
    [
        ([{"type": "kdd"}], UnknownNameError, ["distill.0.type", "'kd'"]),
        ([{"type": "kd"}, {"type": "kd", "temperature": -1}], RecipeError, ["distill.1.temper"]),
        ([{"type": "kd", "temprature": 4}], RecipeError, ["distill.0.temprature", "'temperature'"]),
        ([{"type": "kd", "weight": "much"}], RecipeError, ["distill.0.weight", "'much'"]),
        ([{"type": "kd", "weight": float("nan")}], RecipeError, ["distill.0.weight"]),
        ([{"type": "kd", "teacher": "layer3"}], RecipeError, ["distill.0", "none of the student"]),
        ([{"type": "mimic"}], RecipeError, ["distill.0.student", "required"]),
        ([{"type": "mimic", "student": "a", "connector": "x"}], RecipeError, ["0.connector"]),
        ([{"temperature": 4}], RecipeError, ["distill.0.type"]),
        ([{"type": "slimkit.errors:nearest"}], RecipeError, ["distill.0.type", "DistillLoss"]),
        (["kd"], RecipeError, ["distill.0", "mapping"]),
        ({"type": "kd"}, RecipeError, ["distill", "list"]),
    ],
)
def test_mistakes_name_their_path(
    entries: Any, error: type[SlimkitError], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        parse_losses(entries)
    for part in parts:
        assert part in str(caught.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        KD().temperature = 2  # type: ignore[misc]
