"""The figures of a report: headline, table of variants, running, certainty, what to deploy.

The page and the terminal show the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkit.report import words
from slimkit.report.intervals import Interval
from slimkit.report.reading import Report, Score, Variant

__all__ = [
    "certainty",
    "columns",
    "deployment",
    "gate",
    "headline",
    "metric_cell",
    "row",
    "running",
    "score_judgement",
    "sure",
]


def _judged(now: float | None, before: float | None, *, more: bool = False) -> str:
    """``better``, ``worse`` or nothing, of a figure whose change is large enough to be written."""
    if now is None or before is None or not words.change(now, before).strip("±0"):
        return ""
    return "better" if (now > before) == more else "worse"


def score_judgement(report: Report, variant: Variant) -> str:
    """The same of the score, and ``unsure`` where the change is within the error."""
    difference = report.score_change(variant)
    if not difference or report.head.change(difference) == "±0":
        return ""
    known = variant.changes.get(report.metric)
    if known is not None and known.holds_zero:
        return "unsure"
    return "better" if (difference > 0) == report.head.higher_is_better else "worse"


def headline(report: Report) -> list[dict[str, Any]]:
    """The three figures on top: what they are now, what they were, and how sure they are."""
    final, base, setting = report.final, report.baseline, report.setting
    alone = final is base
    figures: list[dict[str, Any]] = []

    def add(name: str, now: str, before: str, change: str, kind: str, *notes: str) -> None:
        entry: dict[str, Any] = {"name": name, "now": now, "before": "", "change": "", "kind": ""}
        if not alone:
            entry |= {"before": before, "change": change, "kind": kind}
        figures.append({**entry, "notes": [note for note in notes if note], "doubt": ""})

    if report.score(final) is not None:
        now, before = (report.head.written(report.score(v)) for v in (final, base))
        change = report.head.told(report.score_change(final))
        kind = score_judgement(report, final)
        add(report.metric_label, now, before, change, kind, *sure(report, final))
    if "bytes" in final.cost:
        size, old = final.cost["bytes"], base.cost.get("bytes")
        change = words.factor(size, old, "smaller", "larger")
        add("file", words.size(size), words.size(old), change, _judged(size, old))
    fast = final.timed(setting)
    if fast is not None:
        slow = base.median_ms(setting)
        change = words.factor(fast.median_ms, slow, "faster", "slower")
        p90 = "" if fast.p90_ms is None else f"90 % within {words.milliseconds(fast.p90_ms)}"
        kind = _judged(fast.median_ms, slow)
        now, before = words.milliseconds(fast.median_ms), words.milliseconds(slow)
        add("latency, median", now, before, change, kind, p90)
        figures[-1]["doubt"] = (report.unreliable or "").removesuffix(": times are unreliable")
    return figures


def sure(report: Report, variant: Variant) -> list[str]:
    """How sure a variant's score is, and its change: a sentence each; nothing where unknown."""
    told = []
    own = variant.intervals.get(report.metric)
    if own is not None:
        counts = f"{own.right} of {own.of} right; " if own.right is not None else ""
        limits = words.limits(own.low, own.high, report.head.digits)
        unit = f"{words.NARROW}{report.head.unit}" if report.head.unit else ""
        told.append(f"{counts}95 % interval {limits}{unit}")
    change = variant.changes.get(report.metric)
    if change is not None:
        limits = words.limits(change.low, change.high, report.head.digits, signed=True)
        doubt = "within the error of measurement" if change.holds_zero else "beyond the error"
        told.append(f"change {limits}: {doubt}")
    return told


def columns(report: Report) -> list[str]:
    """Titles of the table of variants, without its first."""
    score = [report.head.title] if report.score(report.baseline) is not None else []
    latencies = [f"{item.label}, median" for item in report.latencies]
    made = ["made in"] if any(variant.seconds is not None for variant in report.variants) else []
    return [*score, "parameters", "MACs", "file", *latencies, *made]


def _cell(text: str, change: str = "", title: str = "", kind: str = "") -> dict[str, str]:
    return {"text": text, "change": change, "title": title, "kind": kind}


def row(report: Report, variant: Variant) -> dict[str, Any]:
    """One variant: a cell per column, each with its change against the first variant."""
    base = report.baseline
    first = variant is base
    cells = []
    if report.score(base) is not None:
        exact = variant.torch_metrics.get(report.metric)
        title = "" if exact is None else f"in PyTorch: {report.head.written(exact)}"
        change = "" if first else report.head.change(report.score_change(variant))
        kind = "" if first else score_judgement(report, variant)
        cells.append(_cell(report.head.plain(report.score(variant)), change, title, kind))
    for key, write in (("params", words.count), ("macs", words.count), ("bytes", words.size)):
        now, before = variant.cost.get(key), base.cost.get(key)
        title = "" if now is None else f"{now:,.0f}"
        change, kind = ("", "") if first else (words.change(now, before), _judged(now, before))
        cells.append(_cell(write(now), change, title, kind))
    for example in report.latencies:
        entry = variant.timed(example.setting)
        if entry is None:
            cells.append(_cell("–"))
            continue
        before = base.median_ms(example.setting)
        title = "" if entry.p90_ms is None else f"p90 {words.milliseconds(entry.p90_ms)}"
        change, kind = "", ""
        if not first:
            change = words.change(entry.median_ms, before)
            kind = _judged(entry.median_ms, before)
        doubt = " *" if entry.busy else ""
        cells.append(_cell(words.milliseconds(entry.median_ms) + doubt, change, title, kind))
    if "made in" in columns(report):
        cells.append(_cell(words.duration(variant.seconds)))
    chain = " → ".join(stage.name for stage in variant.stages)
    return {"name": variant.name, "chain": chain, "cells": cells}


def metric_cell(score: Score, variant: Variant, base: Variant | None) -> dict[str, str]:
    """Any metric of a variant, with its change against ``base``."""
    now = variant.metrics.get(score.name)
    before = None if base is None else base.metrics.get(score.name)
    if now is None or before is None:
        return _cell(score.plain(now))
    change, kind = score.change(now - before), ""
    known = variant.changes.get(score.name)
    if change != "±0":
        kind = "better" if (now > before) == score.higher_is_better else "worse"
        kind = "unsure" if known is not None and known.holds_zero else kind
    return _cell(score.plain(now), change, kind=kind)


def running(report: Report) -> dict[str, Any]:
    """Median, 90th percentile, throughput and memory of every file on every backend."""
    rows = []
    several = len(report.latencies) > 1
    items = [(v, item) for item in report.latencies for v in report.variants]
    memory = any(i.memory_bytes is not None for v in report.variants for i in v.latency)
    for variant, example in items:
        entry = variant.timed(example.setting)
        if entry is None:
            continue
        rate = entry.images_per_second or 1000 * entry.batch / entry.median_ms
        cells = [
            words.milliseconds(entry.median_ms) + (" *" if entry.busy else ""),
            words.milliseconds(entry.p90_ms),
            words.count(rate),
            *([words.size(entry.memory_bytes)] if memory else []),
        ]
        rows.append({"name": variant.name, "chain": entry.label if several else "", "cells": cells})
    titles = ["latency, median", "latency, 90th percentile", "images per second"]
    place = "" if several or not report.latencies else report.latencies[0].label
    return {"columns": [*titles, *(["memory"] if memory else [])], "rows": rows, "place": place}


def certainty(report: Report) -> dict[str, Any]:
    """Counts and intervals of the score, and of its change on the same samples."""
    head, metric = report.head, report.metric
    known = [v for v in report.variants if metric in v.intervals]
    counted = any(v.intervals[metric].right is not None for v in known)
    rows = []
    for variant in known:
        own, change = variant.intervals[metric], variant.changes.get(metric)
        counts = [_of(own.right, own.of)] if counted else []
        cells = [_cell(text) for text in (*counts, words.limits(own.low, own.high, head.digits))]
        cells += _change_cells(report, variant, change, counted=counted)
        rows.append({"name": variant.name, "chain": "", "cells": cells})
    titles = [*(["right"] if counted else []), f"{head.label}, 95 % interval", "change"]
    titles += ["95 % interval of the change", *(["now right", "now wrong"] if counted else [])]
    methods = [f"{metric_label}: {own.method}" for metric_label, own in _methods(report).items()]
    return {"columns": titles, "rows": rows, "methods": "; ".join(methods)}


def _methods(report: Report) -> dict[str, Interval]:
    """One example of each way in which intervals were found."""
    found: dict[str, Interval] = {}
    for variant in report.variants:
        for title, held in (("intervals", variant.intervals), ("changes", variant.changes)):
            if report.metric in held and held[report.metric].method:
                found.setdefault(title, held[report.metric])
    return found


def _change_cells(
    report: Report, variant: Variant, change: Interval | None, *, counted: bool
) -> list[dict[str, str]]:
    if change is None:
        return [_cell("–") for _ in range(4 if counted else 2)]
    kind = score_judgement(report, variant)
    limits = words.limits(change.low, change.high, report.head.digits, signed=True)
    cells = [
        _cell(report.head.change(report.score_change(variant)), kind=kind),
        _cell(limits, "within the error" if change.holds_zero else ""),
    ]
    if counted:
        cells += [_cell("–" if n is None else str(n)) for n in (change.won, change.lost)]
    return cells


def _of(right: int | None, of: int | None) -> str:
    return "–" if right is None else f"{right} of {of}"


def deployment(report: Report) -> dict[str, Any]:
    """Which variant to deploy, why, and where its files are; empty where nothing was chosen."""
    chosen = report.deploy
    why = str(chosen.get("why") or "")
    if not why:
        return {}
    name = chosen.get("variant")
    variant = next((v for v in report.variants if v.name == name), None)
    left = chosen.get("left_out")
    return {
        "name": None if variant is None else variant.name,
        "why": why,
        "left_out": [
            f"{other} does not: {text}"
            for other, text in (left.items() if isinstance(left, Mapping) else ())
            if other != report.baseline.name
        ],
        "files": () if variant is None else variant.files,
        "doubt": bool(variant is not None and report.unreliable),
    }


def gate(value: Mapping[str, Any]) -> dict[str, Any]:
    """A gate of the recipe with its value."""
    found, limit, passed = value.get("value"), value.get("limit"), bool(value.get("passed"))
    written, bound = "not measured", "at most"
    if isinstance(found, int | float) and isinstance(limit, int | float):
        # a report without bounds: which way round follows from the outcome
        bound = "at least" if passed == (found > limit) else "at most"
        written = f"{found:.3g}"
    return {
        "name": str(value.get("name", "")).replace("_", " "),
        "limit": f"{value.get('bound') or bound} {words.plain(limit)}",
        "value": written,
        "passed": passed,
    }
