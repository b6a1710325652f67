"""Losses of detectors against the formulas of their papers, and who predicts what."""

from __future__ import annotations

import math

import pytest
import torch

from slimkit.losses.detection import distribution_focal, giou, simota, varifocal
from slimkit.models.cells import cells_of


def test_varifocal_weighs_positives_by_quality_and_negatives_by_their_score() -> None:
    logits = torch.tensor([[0.0, 1.0]])
    loss = varifocal(logits, torch.tensor([[0.8, 0.0]]))[0]
    positive = -0.8 * (0.8 * math.log(0.5) + 0.2 * math.log(0.5))
    p = 1 / (1 + math.exp(-1))
    negative = -0.75 * p**2 * math.log(1 - p)
    assert loss.tolist() == pytest.approx([positive, negative], rel=1e-5)


def test_the_weight_of_a_negative_has_no_gradient() -> None:
    logits = torch.zeros(1, 1, requires_grad=True)
    varifocal(logits, torch.zeros(1, 1)).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(0.75 * 0.25 * 0.5)


def test_a_distribution_is_pulled_to_both_neighbours_of_the_target() -> None:
    logits = torch.randn(1, 4 * 8)
    loss = float(distribution_focal(logits, torch.tensor([[2.25, 0.0, 6.5, 3.0]])))
    sides = logits.view(4, 8).log_softmax(-1)
    expected = [
        -(0.75 * sides[0, 2] + 0.25 * sides[0, 3]),
        -sides[1, 0],
        -(0.5 * sides[2, 6] + 0.5 * sides[2, 7]),
        -sides[3, 3],
    ]
    assert loss == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_giou_of_equal_and_of_distant_boxes() -> None:
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    far = torch.tensor([[4.0, 0.0, 6.0, 2.0]])
    assert float(giou(box, box)) == pytest.approx(0.0, abs=1e-5)
    assert float(giou(box, far)) == pytest.approx(1 + (12 - 8) / 12, rel=1e-5)


def test_cells_near_an_object_predict_it_and_no_others() -> None:
    cells = cells_of((64, 64), (8,))
    truth = torch.tensor([[8.0, 8.0, 24.0, 24.0], [40.0, 40.0, 64.0, 64.0]])
    boxes = torch.cat([cells.centres - 8, cells.centres + 8], dim=1)
    logits = torch.full((64, 2), -4.0)
    assigned = simota(logits, boxes, cells.centres, cells.strides, truth, torch.tensor([0, 1]))
    for number, box in enumerate(truth):
        centres = cells.centres[assigned == number]
        assert len(centres) >= 1
        assert bool(((centres > box[:2]) & (centres < box[2:])).all())
    assert int((assigned >= 0).sum()) < 20


def test_a_cell_that_two_objects_want_goes_to_the_one_of_less_cost() -> None:
    cells = cells_of((8, 8), (8,))
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    truth = torch.tensor([[0.0, 0.0, 4.5, 4.5], [0.0, 0.0, 8.0, 8.0]])
    assigned = simota(
        torch.zeros(1, 1), boxes, cells.centres, cells.strides, truth, torch.tensor([0, 0])
    )
    assert assigned.tolist() == [1]


def test_without_objects_all_is_background() -> None:
    cells = cells_of((16, 16), (8,))
    boxes = torch.zeros(4, 4)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assigned = simota(torch.zeros(4, 3), boxes, cells.centres, cells.strides, *nothing)
    assert assigned.tolist() == [-1] * 4
