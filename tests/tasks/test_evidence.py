"""What stands behind a score: records of answers, intervals, what is drawn of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from slimkit.inputs import Batch, Inputs
from slimkit.tasks.classification import ClassificationTask
from slimkit.tasks.detection.evidence import defects
from slimkit.tasks.detection.resampling import matches, resampled
from slimkit.tasks.detection.scenes import Problems, Scene
from slimkit.tasks.detection.scoring import Detections, average_precision
from slimkit.tasks.splits import SampleLoader, Splits


def _splits(labels: Sequence[int], classes: int, facts: dict[str, Any] | None = None) -> Splits:
    images = torch.linspace(0, 1, len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    def collate(rows: list[int]) -> Batch:
        return Batch(Inputs((images[rows],)), torch.tensor([labels[row] for row in rows]))

    test = SampleLoader(range(len(labels)), collate, batch_size=4, role="test")
    names = [f"class {number}" for number in range(classes)]
    train: Any = test
    return Splits(train, train, None, test, "made up", names, facts=facts or {})


def _record(task: ClassificationTask, splits: Splits, answers: Sequence[int], classes: int) -> Any:
    logits = torch.nn.functional.one_hot(torch.tensor(answers), classes).float()
    sizes = [len(batch.targets) for batch in splits.test]
    pairs = zip(logits.split(sizes), splits.test, strict=True)
    examined = task.examine(iter(list(pairs)), splits)
    right = sum(a == int(label) for a, label in zip(answers, _labels(splits), strict=True))
    assert examined.scores["accuracy"] == pytest.approx(100 * right / len(answers))
    return examined.record


def _labels(splits: Splits) -> list[int]:
    return [int(label) for batch in splits.test for label in batch.targets]


LABELS = [0, 0, 1, 1, 2, 2, 0, 1, 2, 0]
BEFORE = [0, 0, 1, 1, 2, 2, 0, 1, 0, 1]  # 8 of 10 are right
AFTER = [0, 0, 1, 2, 2, 2, 0, 1, 2, 2]  # one lost, one won, one wrong in another way


@pytest.fixture
def changed() -> Any:
    task, splits = ClassificationTask(), _splits(LABELS, 3)
    records = {
        name: _record(task, splits, answers, 3)
        for name, answers in (("before", BEFORE), ("after", AFTER))
    }
    return task.evidence(records, splits)


def test_counts_and_changes_stand_beside_the_percentage(changed: Any) -> None:
    first, last = changed.variants["before"], changed.variants["after"]
    assert (first["samples"], "change" in first) == (10, False)
    interval = first["metrics"]["accuracy"]
    assert (interval["right"], interval["of"]) == (8, 10)
    assert (interval["low"], interval["high"]) == pytest.approx((49.02, 94.33), abs=0.01)
    change = last["change"]["accuracy"]
    assert (change["won"], change["lost"], change["of"]) == (1, 1, 10)
    assert change["low"] < 0 < change["high"]


def test_classes_confusions_and_changed_images_are_drawn(changed: Any) -> None:
    table, matrix, gallery = changed.drawings
    assert [row[:4] for row in table["rows"]] == [
        ["class 0", "4", "3 (75.0 %)", "3 (75.0 %)"],
        ["class 1", "3", "3 (100.0 %)", "2 (66.7 %)"],
        ["class 2", "3", "2 (66.7 %)", "3 (100.0 %)"],
    ]
    assert [round(row[4]["change"], 1) for row in table["rows"]] == [0.0, -33.3, 33.3]
    assert matrix["counts"] == [[3, 0, 1], [0, 2, 1], [0, 0, 3]]
    told = [(cell["text"], cell["note"], cell.get("better")) for cell in gallery["cells"]]
    assert told == [
        ("class 1 → class 2", "is class 1", False),
        ("class 0 → class 2", "is class 2", True),
        ("class 1 → class 2", "is class 0", None),
    ]
    assert all(cell["image"]["width"] == 8 for cell in gallery["cells"])
    assert "1 now wrong, 1 now right, 1 wrong in another way" in gallery["note"]


def test_many_classes_are_told_by_their_commonest_mistakes() -> None:
    task, labels = ClassificationTask(), [*range(40), 39, 39]
    splits = _splits(labels, 40)
    answers = [*range(39), 5, 5, 39]
    record = _record(task, splits, answers, 40)
    found = task.evidence({"first": _record(task, splits, labels, 40), "last": record}, splits)
    table, mistakes, _ = found.drawings
    assert len(table["rows"]) == 30
    assert table["rows"][0][:2] == ["class 39", "3"]
    assert mistakes["rows"][0][:4] == ["class 39", "class 5", "0", "2"]
    assert set(found.variants["last"]["metrics"]) == {"accuracy", "top5"}


def test_records_of_other_samples_are_not_compared() -> None:
    task = ClassificationTask()
    one, two = _splits(LABELS, 3), _splits(LABELS[::-1], 3)
    records = {"a": _record(task, one, BEFORE, 3), "b": _record(task, two, BEFORE, 3)}
    assert not task.evidence(records, one).variants


def _scenes(count: int, seed: int = 0) -> list[tuple[Scene, Detections]]:
    """Made-up scenes with crowds, near hits, doubles and misses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    pairs = []
    for number in range(count):
        objects = int(6 * draw(1))
        corner, size = 150 * draw(objects, 2), 40 + 80 * draw(objects, 2)
        boxes, labels = torch.cat([corner, corner + size], 1), (5 * draw(objects)).long()
        scene = Scene(
            torch.zeros(3, 1, 1), (300, 300), boxes, labels, draw(objects) < 0.15,
            size.prod(1), number,
        )  # fmt: skip
        moved = [boxes + scale * (draw(objects, 4) - 0.5) for scale in (12, 30)]
        stray = 150 * draw(8, 2)
        found = torch.cat([*moved, torch.cat([stray, stray + 60], 1)])
        names = torch.cat([labels, labels, (5 * draw(8)).long()])
        scores = draw(len(found)).sort(descending=True).values
        order = torch.randperm(len(found), generator=generator)
        pairs.append((scene, Detections(found[order], scores, names[order])))
    return pairs


def test_recounted_precision_is_that_of_the_evaluator() -> None:
    pairs = _scenes(40)
    pytest.importorskip("faster_coco_eval")
    expected = average_precision(pairs, list("abcde")).metrics["map"]
    (found,) = resampled({"one": matches(pairs)}, resamples=1).values()
    assert found[1] == pytest.approx(expected, abs=1e-9)
    assert 5 < expected < 95


def test_resamples_are_the_same_for_all_and_a_gain_shows_in_their_difference() -> None:
    pairs = _scenes(40)
    worse = [
        (scene, Detections(d.boxes + 8, d.scores, d.labels)) for scene, d in pairs
    ]  # every box a little off
    found = resampled({"a": matches(pairs), "b": matches(worse), "c": matches(pairs)}, resamples=60)
    (first, value), (second, other), (third, _) = found.values()
    assert (first == third).all()
    assert other < value
    assert (second - first).std() < second.std()


def test_defects_of_annotations_are_counted_with_where_they_were_first_met() -> None:
    problems = Problems()
    for where in ("a.xml", "b.xml"):
        problems.note("a box of zero size", where)
    (drawn,) = defects(_splits(LABELS, 3, {"problems": problems.facts()}))
    assert drawn["rows"] == [["a box of zero size", "2", "a.xml"]]
    assert defects(_splits(LABELS, 3)) == []
