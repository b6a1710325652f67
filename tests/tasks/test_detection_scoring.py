"""Average precision by COCO's protocol, and non-maximum suppression."""

from __future__ import annotations

import pytest
import torch

from slimkit.tasks.detection.detectors import Suppression
from slimkit.tasks.detection.scenes import Scene
from slimkit.tasks.detection.scoring import Detections, average_precision


def scene(boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None) -> Scene:
    corners = torch.tensor(boxes).reshape(-1, 4)
    area = (corners[:, 2:] - corners[:, :2]).prod(1)
    crowds = torch.tensor(crowd or [False] * len(boxes))
    return Scene(torch.zeros(3, 1, 1), (200, 200), corners, torch.tensor(labels), crowds, area, 0)


def found(rows: list[tuple[list[float], float, int]]) -> Detections:
    return Detections(
        torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        torch.tensor([row[1] for row in rows]),
        torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


LARGE, SMALL = [0.0, 0.0, 100.0, 100.0], [120.0, 120.0, 140.0, 140.0]


def test_all_found_is_a_hundred_percent_of_each_size_and_class() -> None:
    pairs = [(scene([LARGE, SMALL], [0, 1]), found([(LARGE, 0.9, 0), (SMALL, 0.8, 1)]))]
    scored = average_precision(pairs, ["a", "b", "absent"])
    assert scored.metrics["map"] == pytest.approx(100)
    assert scored.metrics["map_small"] == pytest.approx(100)
    assert scored.metrics["map_large"] == pytest.approx(100)
    assert "map_medium" not in scored.metrics
    assert scored.per_class == {"a": pytest.approx(100), "b": pytest.approx(100)}
    assert scored.curve[0] == (0.0, pytest.approx(1.0))


def test_a_box_that_is_a_little_off_counts_up_to_its_overlap() -> None:
    shifted = [0.0, 0.0, 100.0, 78.0]  # IoU 0.78: right at 0.50 … 0.75, wrong at 0.80 … 0.95
    scored = average_precision([(scene([LARGE], [0]), found([(shifted, 0.9, 0)]))], ["a"])
    assert scored.metrics["map50"] == pytest.approx(100)
    assert scored.metrics["map75"] == pytest.approx(100)
    assert scored.metrics["map"] == pytest.approx(60)


def test_a_better_scored_mistake_halves_the_precision() -> None:
    rows = [(SMALL, 0.9, 0), (LARGE, 0.8, 0)]
    scored = average_precision([(scene([LARGE], [0]), found(rows))], ["a"])
    assert scored.metrics["map50"] == pytest.approx(50)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong() -> None:
    truth = scene([SMALL, LARGE], [0, 0], [False, True])
    rows = [([10.0, 10.0, 50.0, 50.0], 0.9, 0), (SMALL, 0.8, 0)]
    assert average_precision([(truth, found(rows))], ["a"]).metrics["map"] == pytest.approx(100)


def test_nothing_found_or_nothing_there_is_zero() -> None:
    assert average_precision([(scene([LARGE], [0]), found([]))], ["a"]).metrics["map"] == 0
    assert average_precision([(scene([], []), found([(LARGE, 1.0, 0)]))], ["a"]).metrics["map"] == 0


def test_of_overlapping_boxes_of_a_class_the_better_one_stays() -> None:
    boxes = torch.tensor([LARGE, [0.0, 0.0, 100.0, 90.0], SMALL])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.01, 0.3]])
    kept = Suppression(score=0.05, iou=0.6)(boxes, scores, (200, 200))
    assert kept.labels.tolist() == [0, 1, 1]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert len(Suppression(score=0.05, most=1)(boxes, scores, (200, 200)).scores) == 1
    assert len(Suppression(score=0.05, before=1)(boxes, scores, (200, 200)).scores) == 1


def test_boxes_end_at_the_edge_of_the_image() -> None:
    kept = Suppression()(torch.tensor([[-5.0, -5.0, 300.0, 50.0]]), torch.ones(1, 1), (100, 200))
    assert kept.boxes.tolist() == [[0, 0, 200, 50]]
