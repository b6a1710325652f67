"""What stands behind an accuracy: counts and intervals, classes, confusions, changed answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkit.tasks.drawing import Drawing, change, gallery, matrix, picture, table
from slimkit.tasks.evidence import Evidence, change_of_share, share
from slimkit.tasks.splits import Splits, first_batches

__all__ = ["AnswerRecord", "class_evidence"]

_MATRIX_CLASSES = 20
"""Classes up to which a confusion matrix can be read; beyond, the commonest mistakes are listed."""
_TABLE_CLASSES = 30
"""Classes up to which all have a row; beyond, those that changed most."""
_SHOWN_IMAGES = 12
_SHOWN_PIXELS = 128
"""Longest side of a picture in the report: enough to see what is in it, and small in the page."""


class AnswerRecord:
    """Labels, answers and what was among the best five, sample by sample."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.answers: list[int] = []
        self.among_five: list[int] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Keep a batch: logits (N, classes) and labels (N,)."""
        self.labels += labels.tolist()
        self.answers += outputs.argmax(1).tolist()
        if outputs.shape[1] > 5:
            best = outputs.topk(5, dim=1).indices == labels[:, None]
            self.among_five += best.any(1).int().tolist()

    def to_json(self) -> dict[str, list[int]]:
        """All three lists."""
        return {"labels": self.labels, "answers": self.answers, "among_five": self.among_five}


def class_evidence(records: Mapping[str, Any], splits: Splits) -> Evidence:
    """Intervals of every variant; classes, confusions and changed images of first and last.

    Args:
        records: name → :meth:`AnswerRecord.to_json`, or None where nothing was kept.
        splits: the data, whose test images are shown.
    """
    known = {name: record for name, record in records.items() if record and record["labels"]}
    if not known or any(
        record["labels"] != next(iter(known.values()))["labels"] for record in known.values()
    ):
        return Evidence()
    first = next(iter(known.values()))
    figures: dict[str, Mapping[str, Any]] = {}
    for name, record in known.items():
        entry: dict[str, Any] = {
            "samples": len(record["labels"]),
            "metrics": {metric: share(right) for metric, right in _right(record).items()},
        }
        if record is not first:
            before = _right(first)
            entry["change"] = {
                metric: change_of_share(before[metric], right)
                for metric, right in _right(record).items()
                if metric in before
            }
        figures[name] = entry
    return Evidence(figures, _drawings(known, splits))


def _right(record: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Metric → whether each sample is right."""
    pairs = zip(record["labels"], record["answers"], strict=True)
    found = {"accuracy": [label == answer for label, answer in pairs]}
    if record["among_five"]:
        found["top5"] = [bool(flag) for flag in record["among_five"]]
    return found


def _drawings(known: Mapping[str, Any], splits: Splits) -> list[Drawing]:
    names = list(dict.fromkeys([next(iter(known)), list(known)[-1]]))
    labels = known[names[0]]["labels"]
    answers = {name: known[name]["answers"] for name in names}
    top = max((*labels, *(answer for own in answers.values() for answer in own)))
    classes = [str(name) for name in splits.classes]
    classes += [str(number) for number in range(len(classes), top + 1)]
    drawn = [_class_table(labels, answers, classes)]
    if len(classes) <= _MATRIX_CLASSES:
        drawn.append(_confusion_matrix(labels, answers[names[-1]], classes, names[-1]))
    else:
        drawn.append(_confusions(labels, answers, classes))
    if len(names) == 2:
        drawn += _changed(labels, answers, classes, splits)
    return drawn


def _class_table(
    labels: Sequence[int], answers: Mapping[str, Sequence[int]], classes: Sequence[str]
) -> Drawing:
    """Right answers of each class, and the change in points."""
    counts = Counter(labels)
    right = {
        name: Counter(label for label, answer in zip(labels, own, strict=True) if label == answer)
        for name, own in answers.items()
    }
    names = list(answers)
    first, last = right[names[0]], right[names[-1]]
    shown = [number for number in range(len(classes)) if counts[number]]
    note = ""
    if len(shown) > _TABLE_CLASSES:
        difference = {n: (last[n] - first[n]) / counts[n] for n in shown}
        order = sorted(shown, key=lambda n: (-abs(difference[n]), n))[:_TABLE_CLASSES]
        note = f"The {_TABLE_CLASSES} of {len(shown)} classes that changed most."
        shown = sorted(order, key=lambda n: (difference[n], n))
    rows = []
    for number in shown:
        row: list[Any] = [classes[number], str(counts[number])]
        for name in names:
            hits, of = right[name][number], counts[number]
            row += [f"{hits} ({100 * hits / of:.1f} %)"]
        if len(names) == 2:
            row.append(change(100 * (last[number] - first[number]) / counts[number], digits=1))
        rows.append(row)
    columns = ["class", "images", *(f"{name}: right" for name in names)]
    columns += ["change, points"] if len(names) == 2 else []
    return table("Accuracy of each class", columns, rows, note=note)


def _confusion_matrix(
    labels: Sequence[int], answers: Sequence[int], classes: Sequence[str], name: str
) -> Drawing:
    counts = Counter(zip(labels, answers, strict=True))
    size = range(len(classes))
    return matrix(
        f"What {name} takes for what",
        classes,
        [[counts[row, column] for column in size] for row in size],
        rows="is",
        columns="answered",
        note="Confusion matrix on the test images: a row is what an image shows, a column what "
        "was answered; off the diagonal are the mistakes.",
    )


def _confusions(
    labels: Sequence[int], answers: Mapping[str, Sequence[int]], classes: Sequence[str]
) -> Drawing:
    """The commonest mistakes of the last variant, and how often the first makes them."""
    mistakes = {
        name: Counter(pair for pair in zip(labels, own, strict=True) if pair[0] != pair[1])
        for name, own in answers.items()
    }
    names = list(answers)
    rows: list[list[Any]] = []
    for (label, answer), _ in mistakes[names[-1]].most_common(15):
        times = [mistakes[name][label, answer] for name in names]
        row: list[Any] = [classes[label], classes[answer], *(str(count) for count in times)]
        if len(names) == 2:
            row.append(change(times[1] - times[0], higher_is_better=False, digits=0))
        rows.append(row)
    columns = ["is", "answered", *names, *(["change"] if len(names) == 2 else [])]
    return table("The commonest mistakes", columns, rows)


def _changed(
    labels: Sequence[int],
    answers: Mapping[str, Sequence[int]],
    classes: Sequence[str],
    splits: Splits,
) -> list[Drawing]:
    """Images that the last variant answers otherwise than the first, new mistakes first."""
    (first, before), (last, after) = answers.items()
    worse: list[int] = []
    other: list[int] = []
    better: list[int] = []
    for position, (label, then, now) in enumerate(zip(labels, before, after, strict=True)):
        if then != now:
            (worse if then == label else better if now == label else other).append(position)
    count = len(worse) + len(other) + len(better)
    if not count:
        note = f"None: {last} answers all {len(labels)} images as {first} does."
        return [gallery("Images whose answer changed", [], note=note)]
    shown = _some_of_each([worse, better, other], _SHOWN_IMAGES)
    pictures = dict(_pictures(splits, set(shown)))
    cells = []
    for position in shown:
        old, new, truth = (classes[own[position]] for own in (before, after, labels))
        cell: dict[str, Any] = {"text": f"{old} → {new}", "note": f"is {truth}"}
        if position not in other:
            cell["better"] = position in better
        if position in pictures:
            cell["image"] = pictures[position]
        cells.append(cell)
    note = (
        f"{count} of {len(labels)} images, {first} → {last}: {len(worse)} now wrong, "
        f"{len(better)} now right, {len(other)} wrong in another way."
        + (f" {len(shown)} are shown." if len(shown) < count else "")
    )
    return [gallery("Images whose answer changed", cells, note=note)]


def _some_of_each(groups: Sequence[Sequence[int]], most: int) -> list[int]:
    """At most so many members: an equal part of each group, the rest from the first ones."""
    parts = [min(len(group), most // len(groups)) for group in groups]
    for number, group in enumerate(groups):
        parts[number] += min(len(group) - parts[number], most - sum(parts))
    return [member for group, part in zip(groups, parts, strict=True) for member in group[:part]]


def _pictures(splits: Splits, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Position in the test split → the image as it was before normalisation."""
    position = 0
    mean, std = (splits.preprocessing.get(key) for key in ("mean", "std"))
    for batch in first_batches(splits.test):
        images = batch.inputs.tensors()[0]
        chosen = [n for n in range(len(images)) if position + n in wanted]
        for number in chosen:
            image = images[number].float()
            if image.dim() != 3 or image.shape[0] not in {1, 3}:
                return
            if mean and std:
                scale, shift = (torch.tensor(value).view(-1, 1, 1) for value in (std, mean))
                image = image * scale + shift
            yield position + number, picture(_small(image).clamp(0, 1))
        position += len(images)
        if position > max(wanted):
            return


def _small(image: Tensor) -> Tensor:
    longest = max(image.shape[1:])
    if longest <= _SHOWN_PIXELS:
        return image
    size = [max(1, round(side * _SHOWN_PIXELS / longest)) for side in image.shape[1:]]
    return F.interpolate(image[None], size, mode="area")[0]
