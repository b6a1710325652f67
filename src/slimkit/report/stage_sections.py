"""What each stage did: training curves, channels kept, noise of rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.report import words
from slimkit.report.charts import histograms, training_curves
from slimkit.report.reading import Report, StageRun

__all__ = ["channels", "rounding", "stage_runs", "training"]


def stage_runs(report: Report) -> list[tuple[str, StageRun]]:
    """Every distinct stage run with the variants that it belongs to."""
    found: list[tuple[list[str], StageRun]] = []
    for variant in report.variants:
        for stage in variant.stages:
            for names, known in found:
                same = (known.name, known.history, known.channels, known.rounding)
                if same == (stage.name, stage.history, stage.channels, stage.rounding):
                    names.append(variant.name)
                    break
            else:
                found.append(([variant.name], stage))
    return [(", ".join(names), stage) for names, stage in found]


def training(report: Report) -> list[dict[str, str]]:
    """Loss and score over the epochs of every stage that trained."""
    curves = []
    for number, (variants, stage) in enumerate(stage_runs(report)):
        svg = training_curves(
            stage.history,
            name=f"stage{number}",
            metric=report.metric,
            label=report.metric_label,
            digits=report.head.digits,
        )
        if svg:
            curves.append({"stage": stage.name, "variants": variants, "svg": svg})
    return curves


def channels(report: Report) -> list[dict[str, Any]]:
    """How many channels each layer kept, of every stage that pruned."""
    result = []
    for variants, stage in stage_runs(report):
        layers = [
            {
                "layer": str(row["layer"]),
                "kept": row["kept"],
                "total": row["total"],
                "percent": round(100 * row["kept"] / row["total"], 1),
            }
            for row in stage.channels
            if row.get("total")
        ]
        if layers:
            kept, total = (sum(layer[key] for layer in layers) for key in ("kept", "total"))
            result.append(
                {
                    "stage": stage.name,
                    "variants": variants,
                    "layers": layers,
                    "kept": kept,
                    "total": total,
                    "measured": _measured(stage.measured),
                }
            )
    return result


def rounding(report: Report) -> list[dict[str, Any]]:
    """What rounding did to each layer: bars of decibels, histograms of the most damaged ones."""

    def written(row: Mapping[str, Any], key: str) -> str:
        return words.decibels(row.get(key), exact=row.get(key) is None)

    result = []
    for number, (variants, stage) in enumerate(stage_runs(report)):
        rows = [row for row in stage.rounding.get("layers") or () if row.get("layer")]
        known = [row["sqnr_db"] for row in rows if row.get("sqnr_db") is not None]
        if not known:
            continue
        scale = max(*known, 40.0)
        layers = [
            {
                "layer": str(row["layer"]),
                "bits": row.get("bits"),
                "sqnr": written(row, "sqnr_db"),
                "weights": written(row, "weight_sqnr_db"),
                "outputs": written(row, "output_sqnr_db"),
                "percent": round(100 * max(0.0, row.get("sqnr_db") or scale) / scale, 1),
            }
            for row in rows
        ]
        pictures = [
            {
                "layer": str(row["layer"]),
                "svg": histograms(row, name=f"rounding{number}-{place}"),
            }
            for place, row in enumerate(stage.rounding.get("histograms") or ())
        ]
        result.append(
            {"stage": stage.name, "variants": variants, "layers": layers, "pictures": pictures}
        )
    return result


def _measured(facts: Mapping[str, Any]) -> str:
    """What a latency target was measured to be, in one sentence; empty if there was none."""
    if len(facts.get("measured_ms") or ()) != 2:
        return ""
    before, after = facts["measured_ms"]
    threads = facts.get("threads", 1)
    return (
        f"Chosen by measuring: {words.milliseconds(before)} → {words.milliseconds(after)} "
        f"({words.change(after, before)}) in {facts.get('backend')}, "
        f"{threads} thread{'' if threads == 1 else 's'}."
    )
