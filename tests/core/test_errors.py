from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit import errors
from slimkit.errors import GateError, RecipeError, SlimkitError, UnknownNameError, nearest


def test_message_names_the_place_the_fault_and_the_way_out() -> None:
    error = RecipeError("unknown criterion 'l3'", where="stages.prune.criterion", hint="try 'l2'")
    assert str(error) == "stages.prune.criterion: unknown criterion 'l3' (try 'l2')"
    assert (error.where, error.hint) == ("stages.prune.criterion", "try 'l2'")
    assert str(SlimkitError("plain")) == "plain"


def test_bad_input_exits_with_2_and_a_missed_gate_with_1() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__ if name != "nearest"]
    assert all(issubclass(kind, SlimkitError) for kind in kinds)
    assert {kind.exit_code for kind in kinds if kind is not GateError} == {2}
    assert GateError.exit_code == 1


def test_errors_can_be_caught_as_the_builtin_they_are_like() -> None:
    with pytest.raises(LookupError):
        raise UnknownNameError("unknown")
    with pytest.raises(ValueError, match="wrong"):
        raise RecipeError("wrong")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l3", "did you mean 'l2' or 'l1'?"),
        ("FPGM", "did you mean 'fpgm'?"),
        ("entirely different", "choose from: bn_scale, fpgm, l1, l2"),
    ],
)
def test_nearest_suggests_or_lists(name: str, expected: str) -> None:
    assert nearest(name, ["l2", "l1", "fpgm", "bn_scale"]) == expected


def test_nearest_without_any_choice_says_so() -> None:
    assert nearest("x", []) == "there are no valid choices"


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30))
def test_nearest_always_answers_with_valid_choices(name: str, choices: list[str]) -> None:
    answer = nearest(name, choices)
    assert any(repr(choice) in answer or choice in answer for choice in choices)
