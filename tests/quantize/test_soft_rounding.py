from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimkit.quantize.methods.fixed_weights import Grid
from slimkit.quantize.methods.soft_rounding import (
    RoundingSchedule,
    SoftRounding,
    optimise,
    rectified_sigmoid,
)


def int4(weight: Tensor, scale: Tensor) -> Grid:
    ends = (torch.full_like(weight, end) for end in (-7.0, 7.0))
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return Grid(scale, zero_point, scale.expand_as(weight), *ends)


def test_rectified_sigmoid_by_hand() -> None:
    v = torch.tensor([0.0, math.log(3.0), -10.0, 10.0])
    expected = [0.5, 0.75 * 1.2 - 0.1, 0.0, 1.0]  # σ(log 3) = 3/4
    assert rectified_sigmoid(v).tolist() == pytest.approx(expected, abs=1e-6)


def test_it_starts_at_the_float_weight_and_ends_on_the_grid() -> None:
    weight = torch.tensor([[0.3, -1.4, 0.0], [2.5, 1.0, -0.01]])
    rounding = SoftRounding(weight, int4(weight, torch.tensor([[0.5], [0.25]])))
    # 2.5 / 0.25 = 10 lies beyond the largest level 7, the rest between two levels.
    expected = torch.tensor([[0.3, -1.4, 0.0], [1.75, 1.0, -0.01]])
    torch.testing.assert_close(rounding().detach(), expected, atol=1e-6, rtol=0)
    assert rounding.levels().tolist() == [[1.0, -3.0, 0.0], [7.0, 4.0, 0.0]]


def test_regulariser_by_hand() -> None:
    # h = 0.6, 0.2, and two weights that cannot move: a zero and one beyond the grid.
    weight = torch.tensor([0.6, 3.2, 0.0, 99.0])
    rounding = SoftRounding(weight, int4(weight, torch.tensor(1.0)))
    moving = [1 - abs(2 * h - 1) ** 3 for h in (0.6, 0.2)]
    assert rounding.regulariser(3.0).item() == pytest.approx(sum(moving) / 4, rel=1e-5)


def test_beta_falls_along_half_a_cosine_after_the_warm_start() -> None:
    schedule = RoundingSchedule(100, lr=0.1, weight=1.0, warm_start=0.2, beta=(20.0, 2.0))
    assert schedule.beta_at(19) is None
    assert schedule.beta_at(20) == 20.0
    assert schedule.beta_at(60) == pytest.approx(11.0)
    assert schedule.beta_at(99) == pytest.approx(2.0, abs=0.01)


def test_roundings_go_where_the_loss_wants_them_but_zeros_stay() -> None:
    weight = torch.tensor([0.4, 0.6, 0.0, -1.5, 1e-30])
    rounding = SoftRounding(weight, int4(weight, torch.tensor(1.0)))
    wanted = torch.tensor([1.0, 0.0, 5.0, -1.0, 0.0])
    optimise(
        [rounding],
        lambda: (rounding() - wanted).square().mean(),
        RoundingSchedule(200, lr=0.1, weight=0.01),
    )
    assert rounding.levels().tolist() == [1.0, 0.0, 0.0, -1.0, 0.0]
    soft = rectified_sigmoid(rounding.v)[weight != 0]
    assert bool(((soft < 0.01) | (soft > 0.99)).all())  # the regulariser has done its work
