"""Intervals of shares and of paired differences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkit.errors import InputError
from slimkit.measure.intervals import paired_difference, wilson


def test_wilsons_interval_is_that_of_the_literature() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_a_paired_difference_is_computed_by_hand() -> None:
    # 12 only right after, 4 only before, of 100: p = 13/102 and 5/102
    middle, spread = 8 / 102, 1.959964 * ((18 / 102 - (8 / 102) ** 2) / 102) ** 0.5
    assert paired_difference(12, 4, 100) == pytest.approx((middle - spread, middle + spread))


@given(st.integers(1, 2000), st.data())
def test_limits_hold_the_share_and_turn_round_with_it(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    lost = data.draw(st.integers(0, count - right))
    low, high = paired_difference(right, lost, count)
    assert -1 <= low <= high <= 1
    assert paired_difference(lost, right, count) == pytest.approx((-high, -low))


@pytest.mark.parametrize("counts", [(-1, 5), (6, 5), (0, 0)])
def test_what_is_no_share_is_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        wilson(*counts)
    with pytest.raises(InputError):
        paired_difference(counts[0], 0, counts[1])
