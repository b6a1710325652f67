"""What stands behind a mAP: bootstrap intervals, classes, curves, boxes, defects of annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slimkit.measure.intervals import LEVEL
from slimkit.tasks.detection.resampling import matches, resampled
from slimkit.tasks.detection.samples import SceneSamples
from slimkit.tasks.detection.scenes import Scene
from slimkit.tasks.detection.scoring import AveragePrecision, Detections
from slimkit.tasks.drawing import Drawing, change, lines, picture, samples, table
from slimkit.tasks.evidence import Evidence, interval
from slimkit.tasks.splits import Splits, first_batches

__all__ = ["defects", "detection_evidence", "detection_record", "objects_of"]

_SHOWN_IMAGES = 6
"""Images in the report: enough for an impression, few enough for the page's size."""
_SHOWN_SCORE = 0.4
"""Boxes below it are not drawn: they are there for the curve, not for people."""
_WORK = 40_000_000
"""Detections that are weighed in all resamples together: a few seconds."""
_RESAMPLES = (50, 400)
"""At least and at most: the ends of an interval of 95 % need a few beyond them."""


def objects_of(
    found: Detections, classes: Sequence[str], least: float = 0.0
) -> list[dict[str, Any]]:
    """Detections of one image: ``[{"class", "score", "box": [x1, y1, x2, y2]}, …]``."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [
        {"class": classes[label], "score": score, "box": [round(side, 2) for side in box]}
        for label, score, box in rows
        if score >= least
    ]


def detection_record(
    pairs: Sequence[tuple[Scene, Detections]], scored: AveragePrecision, classes: Sequence[str]
) -> dict[str, Any]:
    """What a report needs of one variant, JSON-able.

    Args:
        pairs: scenes of the test split and what was found in them.
        scored: their average precision.
        classes: names in the order of the labels.
    """
    return {
        "matches": matches(pairs),
        "per_class": scored.per_class,
        "curve": scored.curve,
        "shown": [objects_of(found, classes, _SHOWN_SCORE) for _, found in pairs[:_SHOWN_IMAGES]],
    }


def detection_evidence(records: Mapping[str, Any], splits: Splits) -> Evidence:
    """Intervals of every variant; boxes, classes and curves of the first and the last.

    Args:
        records: name → :func:`detection_record`, or None where nothing was kept.
        splits: the data, whose first test images are shown.
    """
    known = {name: record for name, record in records.items() if record}
    if not known:
        return Evidence(drawings=defects(splits))
    names = list(dict.fromkeys([next(iter(known)), list(known)[-1]]))
    drawn = [
        _boxes(known, names, splits),
        _class_table(known, names, splits.classes),
        _curves(known, names),
        *defects(splits),
    ]
    return Evidence(_intervals(known), drawn)


def _intervals(known: Mapping[str, Any]) -> dict[str, Any]:
    held = {name: record["matches"] for name, record in known.items()}
    images = next(iter(held.values()))["images"]
    if images < 2 or any(record["images"] != images for record in held.values()):
        return {}
    detections = sum(
        len(entry["image"]) for record in held.values() for entry in record["classes"].values()
    )
    least, most = _RESAMPLES
    resamples = min(most, max(least, _WORK // (10 * max(1, detections))))
    found = resampled(held, resamples=resamples)
    first_draws, first_value = next(iter(found.values()))
    figures: dict[str, Any] = {}
    for number, (name, (draws, value)) in enumerate(found.items()):
        entry: dict[str, Any] = {
            "samples": images,
            "metrics": {"map": _bootstrap(draws, value, (0.0, 100.0), resamples)},
        }
        if number:
            difference = _bootstrap(
                draws - first_draws, value - first_value, (-100.0, 100.0), resamples
            )
            entry["change"] = {"map": difference}
        figures[name] = entry
    return figures


def _bootstrap(
    draws: NDArray[np.float64], value: float, within: tuple[float, float], resamples: int
) -> dict[str, Any]:
    """Percentiles of the resamples, moved so that their median is the value itself."""
    tail = 100 * (1 - LEVEL) / 2
    low, middle, high = np.percentile(draws, [tail, 50, 100 - tail])
    ends = [min(max(value + end - middle, within[0]), within[1]) for end in (low, high)]
    method = f"bootstrap of the images, {resamples} resamples"
    return interval(float(ends[0]), float(ends[1]), method)


def _boxes(known: Mapping[str, Any], names: Sequence[str], splits: Splits) -> Drawing:
    """The annotated images beside what both variants find in them."""
    rows = []
    count = min(len(known[name]["shown"]) for name in names)
    for number, scene in enumerate(_first_scenes(splits, count)):
        shown = picture(_pixels(scene))
        truth = [
            {"box": box, "label": splits.classes[label]}
            for box, label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True)
        ]
        cells: list[dict[str, Any]] = [{"image": shown, "boxes": truth}]
        for name in names:
            boxes = [
                {"box": o["box"], "label": f"{o['class']} {100 * o['score']:.0f}"}
                for o in known[name]["shown"][number]
            ]
            cells.append({"image": shown, "boxes": boxes})
        rows.append(cells)
    title = f"Objects found with a score of at least {_SHOWN_SCORE}"
    note = "The first test images; the number behind a class is the score in percent."
    return samples(title, ["annotated", *names], rows, note=note)


def _class_table(known: Mapping[str, Any], names: Sequence[str], classes: Sequence[str]) -> Drawing:
    first, last = known[names[0]], known[names[-1]]
    rows: list[list[Any]] = []
    for label, entry in first["matches"]["classes"].items():
        name = classes[int(label)]
        if name not in first["per_class"] or name not in last["per_class"]:
            continue
        values = [known[variant]["per_class"][name] for variant in names]
        row = [name, str(len(entry["objects"])), *(f"{value:.1f}" for value in values)]
        rows.append([*row, change(values[1] - values[0], digits=1)] if len(names) == 2 else row)
    columns = ["class", "objects", *names, *(["change, points"] if len(names) == 2 else [])]
    return table("mAP of each class, %", columns, rows)


def _curves(known: Mapping[str, Any], names: Sequence[str]) -> Drawing:
    return lines(
        "Precision over recall at IoU 0.5, mean over the classes",
        "recall",
        "precision",
        {name: [(x, y) for x, y in known[name]["curve"]] for name in names},
    )


def defects(splits: Splits) -> list[Drawing]:
    """What was wrong with the annotations, counted; empty if nothing was."""
    problems = splits.facts.get("problems") or {}
    if not problems:
        return []
    rows = [
        [kind, str(problem["count"]), str(problem["first"])] for kind, problem in problems.items()
    ]
    note = "Left out, or cut where it says so; on_bad_annotation: error stops at the first."
    columns = ["defect", "how often", "first met in"]
    return [table("Defects of the annotations", columns, rows, note=note)]


def _first_scenes(splits: Splits, count: int) -> list[Scene]:
    scenes: list[Scene] = []
    for batch in first_batches(splits.test):
        scenes += [target["scene"] for target in batch.targets]
        if len(scenes) >= count:
            break
    return scenes[:count]


def _pixels(scene: Scene) -> Tensor:
    """A scene's image, uint8 (3, H, W)."""
    return SceneSamples([scene], None)[0].pixels
