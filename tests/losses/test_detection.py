"""Losses of detectors against the formulas of their papers, and who predicts what."""

from __future__ import annotations

import math

import pytest
import torch

from slimkit.losses.detection import (
    box_iou_pairs,
    distribution_focal,
    giou,
    localization_distillation,
    quality_distillation,
    simota,
    varifocal,
)
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


def test_the_assignment_is_that_of_the_formula_cell_by_cell_and_object_by_object() -> None:
    """Against a plain reading of the paper, one object after the other, on crowded scenes."""
    from torchvision.ops import box_iou, generalized_box_iou

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        grid = torch.arange(12).double() * 8 + 4  # in float32 10⁸ + cost would be ties
        centres = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2)
        strides = torch.full((len(centres),), 8.0).double()
        reach = 4 + 16 * torch.rand(len(centres), 4, generator=generator)
        boxes = torch.cat([centres - reach[:, :2], centres + reach[:, 2:]], 1)
        logits = torch.randn(len(centres), 3, generator=generator).double()
        corners = 60 * torch.rand(9, 2, generator=generator).double()
        truth = torch.cat([corners, corners + 6 + 30 * torch.rand(9, 2, generator=generator)], 1)
        labels = torch.randint(3, (9,), generator=generator)

        inside = ((centres[:, None] > truth[:, :2]) & (centres[:, None] < truth[:, 2:])).all(-1)
        middle = (truth[:, :2] + truth[:, 2:]) / 2
        near = (centres[:, None] - middle).abs().amax(-1) < 2.5 * 8
        overlap = box_iou(boxes, truth)
        cost = 6 * (1 - generalized_box_iou(boxes, truth))
        for g, label in enumerate(labels.tolist()):
            quality = torch.zeros_like(logits)
            quality[:, label] = overlap[:, g]
            cost[:, g] += varifocal(logits, quality).sum(1)
        cost += 1e8 * ~(inside & near)
        allowed = (inside | near).any(1)
        cost[~allowed] = torch.inf
        owners: dict[int, list[int]] = {}
        for g in range(len(truth)):
            share = max(1, int(overlap[allowed, g].topk(10).values.sum()))
            for cell in cost[:, g].topk(share, largest=False).indices.tolist():
                owners.setdefault(cell, []).append(g)
        expected = torch.full((len(centres),), -1)
        for cell, wanting in owners.items():
            best = cost[cell].argmin().item() if len(wanting) > 1 else wanting[0]
            expected[cell] = int(best)
        found = simota(logits, boxes, centres, strides, truth, labels)
        assert found.tolist() == expected.tolist()


def test_a_student_that_agrees_has_nothing_to_learn_of_scores_and_sides() -> None:
    scores, sides = torch.randn(2, 5, 3), torch.randn(2, 5, 32)
    assert float(quality_distillation(scores, scores)) == pytest.approx(0, abs=1e-6)
    assert float(localization_distillation(sides, sides, scores)) == pytest.approx(0, abs=1e-6)
    assert float(localization_distillation(sides, sides, scores, bins=1)) == 0


def test_distillation_of_scores_by_hand() -> None:
    """One cell and class: teacher 0.5, student 0.8, so |0.3| · (BCE(0.8, 0.5) − entropy) / 1."""
    student, teacher = torch.tensor([[[math.log(4.0)]]]), torch.zeros(1, 1, 1)
    excess = -0.5 * math.log(0.8) - 0.5 * math.log(0.2) - math.log(2)
    assert float(quality_distillation(student, teacher)) == pytest.approx(0.3 * excess)


def test_distillation_of_sides_counts_where_the_teacher_sees_something() -> None:
    """Of two cells the teacher is sure of one (σ = 1) and sees nothing in the other (σ = 0)."""
    scores = torch.tensor([[[40.0], [-40.0]]])
    teacher = torch.zeros(1, 2, 8)  # two bins per side, one half each
    student = torch.zeros(1, 2, 8)
    student[0, 0, :2] = torch.tensor([math.log(3.0), 0.0])  # ¾, ¼ on one side of four
    student[0, 1] = 7 * torch.randn(8)  # counts nothing
    divergence = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    value = localization_distillation(student, teacher, scores, bins=2, temperature=1.0)
    assert float(value) == pytest.approx(divergence / 4, rel=1e-5)


def test_iou_of_pairs_is_the_diagonal_of_all() -> None:
    from torchvision.ops import box_iou

    corners = 20 * torch.rand(7, 2)
    boxes = torch.cat([corners, corners + 1 + 9 * torch.rand(7, 2)], 1)
    others = boxes.roll(1, 0) + torch.rand(7, 4)
    torch.testing.assert_close(box_iou_pairs(boxes, others), box_iou(boxes, others).diagonal())
