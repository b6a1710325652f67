from __future__ import annotations

import inspect
import typing
from dataclasses import fields
from typing import Any

import pytest

from slimkit.cli.mirrored import options_of
from slimkit.cli.quantize_command import quantize_command
from slimkit.limits import Limit
from slimkit.recipe.stages.quantization import PtqStage

MIRRORED = [field for field in fields(Limit) if "help" in field.metadata]


def test_a_command_has_one_option_per_field() -> None:
    seen: list[Any] = []

    @options_of(Limit, into="limit")
    def command(model: str, *, limit: dict[str, Any]) -> None:
        seen.append((model, limit))

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["model", *(field.name for field in MIRRORED)]
    command(model="m", max_drop=1.0, min_sqnr=None, max_float=None, fewest="macs")
    assert seen == [("m", {"max_drop": 1.0, "min_sqnr": None, "max_float": None, "fewest": "macs"})]


@pytest.mark.parametrize("field", MIRRORED, ids=lambda field: field.name)
def test_command_and_recipe_have_the_fields_and_defaults_of_the_value(field: Any) -> None:
    parameter = inspect.signature(quantize_command).parameters[field.name]
    assert parameter.default == field.default == PtqStage.model_fields[field.name].default
    (option,) = typing.get_args(parameter.annotation)[1:]
    assert option.help == field.metadata["help"]
