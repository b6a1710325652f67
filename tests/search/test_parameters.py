from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit.errors import InputError
from slimkit.search import Choice, FloatRange, IntRange, Parameter
from slimkit.search.parameters import checked_parameters


@st.composite
def parameters(draw: st.DrawFn) -> Parameter:
    kind = draw(st.sampled_from(["int", "float", "log", "choice"]))
    if kind == "int":
        low, extent = draw(st.integers(-50, 50)), draw(st.integers(0, 50))
        return IntRange(low, low + extent, step=draw(st.integers(1, 9)))
    if kind == "choice":
        return Choice(*draw(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True)))
    low_float, factor = draw(st.floats(1e-6, 1e3)), draw(st.floats(1, 1e6))
    return FloatRange(low_float, low_float * factor, log=kind == "log")


@given(parameters(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_samples_and_neighbours_are_possible_values(
    parameter: Parameter, seed: int, width: float
) -> None:
    rng = np.random.default_rng(seed)
    value = parameter.sample(rng)
    other = parameter.neighbour(value, rng, width)
    assert parameter.checked(value) == value
    assert parameter.checked(other) == other
    distribution = parameter.distribution()
    for found in (value, other):
        assert distribution._contains(distribution.to_internal_repr(found))


@given(parameters(), st.integers(0, 2**32 - 1))
def test_a_neighbour_is_another_value_where_there_is_one(parameter: Parameter, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = parameter.sample(rng)
    only_one = getattr(parameter, "steps", None) == 0 or len(getattr(parameter, "values", "12")) < 2
    if not isinstance(parameter, FloatRange) and not only_one:
        assert parameter.neighbour(value, rng, 1.0) != value


def test_both_ends_of_a_range_are_drawn_and_all_equally_often() -> None:
    rng = np.random.default_rng(0)
    drawn = [IntRange(2, 11, step=3).sample(rng) for _ in range(4000)]
    counts = {value: drawn.count(value) for value in set(drawn)}
    assert sorted(counts) == [2, 5, 8, 11]
    assert min(counts.values()) > 900


def test_a_neighbour_is_no_further_than_the_width() -> None:
    rng = np.random.default_rng(0)
    near = {IntRange(0, 100).neighbour(50, rng, 0.02) for _ in range(200)}
    assert near == {48, 49, 51, 52}
    factors = [FloatRange(1e-4, 1.0, log=True).neighbour(0.01, rng, 0.25) for _ in range(200)]
    assert 0.001 <= min(factors) < 0.002  # a quarter of four decades
    assert 0.05 < max(factors) <= 0.1 + 1e-12


def test_half_of_a_logarithmic_range_lies_below_its_geometric_middle() -> None:
    rng = np.random.default_rng(0)
    drawn = [FloatRange(1e-4, 1.0, log=True).sample(rng) for _ in range(2000)]
    assert 0.45 < np.mean([value < 1e-2 for value in drawn]) < 0.55


def test_values_get_the_type_of_their_parameter() -> None:
    space: Any = {"n": IntRange(0, 9), "x": FloatRange(0, 1), "c": Choice(1.5, "a")}
    found = checked_parameters(space, {"c": "a", "x": 1, "n": np.int64(3)}, where="here")
    assert found == {"n": 3, "x": 1.0, "c": "a"}
    assert [type(value) for value in found.values()] == [int, float, str]
    assert list(found) == ["n", "x", "c"]


@pytest.mark.parametrize(
    ("space", "value", "message"),
    [
        (IntRange(0, 8, step=4), 2, "expected one of 0 … 8 in steps of 4, got 2"),
        (IntRange(0, 8), 1.5, "expected a whole number"),
        (IntRange(0, 8), True, "expected a whole number"),
        (IntRange(0, 8), float("nan"), "here.p"),
        (FloatRange(0, 1), float("nan"), "expected a number in 0 … 1, got nan"),
        (FloatRange(0, 1), "half", "expected a number in 0 … 1"),
        (Choice("plain", "wide"), "wyde", "unknown value 'wyde': did you mean 'wide'"),
    ],
)
def test_a_value_that_is_not_possible_is_named(space: Any, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_parameters({"p": space}, {"p": value}, where="here")


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntRange(3, 2),
        lambda: IntRange(0, 2, step=0),
        lambda: FloatRange(1.0, 0.0),
        lambda: FloatRange(0.0, 1.0, log=True),
        lambda: FloatRange(0.0, float("inf")),
        Choice,
        lambda: Choice("a", "a"),
        lambda: Choice(1, True),
        lambda: Choice([1, 2]),  # type: ignore[arg-type]
    ],
)
def test_a_parameter_without_values_cannot_be_made(make: Any) -> None:
    with pytest.raises(InputError):
        make()
