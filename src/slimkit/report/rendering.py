"""``report.html``: one self-contained page, built from ``report.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.artifact import PathLike, read_json, write_text
from slimkit.errors import ArtifactError
from slimkit.report import words
from slimkit.report.charts import ChartPoint, histograms, scatter, training_curves
from slimkit.report.drawings import drawn
from slimkit.report.reading import Report, StageRun, Variant, parse_report

__all__ = ["build_html", "write_report"]


def write_report(out_dir: PathLike) -> Path:
    """Build ``report.html`` beside the ``report.json`` of a run.

    Args:
        out_dir: the output folder of ``slimkit run``.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: there is no readable report in the folder, or it is not writable.
    """
    folder = Path(out_dir)
    target = folder / "report.html"
    write_text(target, build_html(read_json(folder / "report.json")))
    return target


def build_html(report: Mapping[str, Any]) -> str:
    """The page for a report, as one HTML document without any outside resource.

    Args:
        report: the contents of a ``report.json``.

    Raises:
        ArtifactError: it is no report.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    parsed = parse_report(report)
    environment = Environment(
        loader=PackageLoader("slimkit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words)
    template = environment.get_template("report.html.j2")
    try:
        page = template.render(_contents(parsed))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ArtifactError(f"the report is damaged: {error!r}", where="report.json") from error
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _contents(parsed: Report) -> dict[str, Any]:
    """What the template needs."""
    return {
        "report": parsed,
        "headline": _headline(parsed),
        "columns": _columns(parsed),
        "rows": [_row(parsed, variant) for variant in parsed.variants],
        "proofs": _proofs(parsed),
        "pictures": _pictures(parsed),
        "metrics": _metrics(parsed),
        "drawings": drawn(parsed),
        "estimates": _estimates(parsed),
        "curves": _curves(parsed),
        "channels": _channels(parsed),
        "rounding": _rounding(parsed),
        "gates": [_gate(gate) for gate in parsed.gates],
        "warnings": _warnings(parsed),
        "facts": _facts(parsed),
    }


def _headline(report: Report) -> list[dict[str, str]]:
    """The three figures on top: what they are now, and what they were."""
    final, base, setting = report.final, report.baseline, report.setting
    alone = final is base
    difference = report.score_change(final)
    figures = []
    if report.score(final) is not None:
        figures.append(
            {
                "name": report.metric_label,
                "now": report.head.written(report.score(final)),
                "before": "" if alone else report.head.written(report.score(base)),
                "change": "" if alone else report.head.told(difference),
            }
        )
    if "bytes" in final.cost:
        now, before = final.cost["bytes"], base.cost.get("bytes")
        figures.append(
            {
                "name": "file",
                "now": words.size(now),
                "before": "" if alone else words.size(before),
                "change": "" if alone else words.factor(now, before, "smaller", "larger"),
            }
        )
    if final.median_ms(setting) is not None:
        fast, slow = final.median_ms(setting), base.median_ms(setting)
        figures.append(
            {
                "name": "latency",
                "now": words.milliseconds(fast),
                "before": "" if alone else words.milliseconds(slow),
                "change": "" if alone else words.factor(fast, slow, "faster", "slower"),
            }
        )
    return figures


def _columns(report: Report) -> list[str]:
    score = [report.head.title] if report.score(report.baseline) is not None else []
    latencies = [f"{item.label}, median" for item in report.latencies]
    return [*score, "parameters", "MACs", "file", *latencies]


def _cell(text: str, change: str = "", title: str = "") -> dict[str, str]:
    return {"text": text, "change": change, "title": title}


def _row(report: Report, variant: Variant) -> dict[str, Any]:
    base = report.baseline
    first = variant is base
    cells = []
    if report.score(base) is not None:
        exact = variant.torch_metrics.get(report.metric)
        title = "" if exact is None else f"in PyTorch: {report.head.written(exact)}"
        change = "" if first else report.head.change(report.score_change(variant))
        cells.append(_cell(report.head.plain(report.score(variant)), change, title))
    for key, write in (("params", words.count), ("macs", words.count), ("bytes", words.size)):
        now, before = variant.cost.get(key), base.cost.get(key)
        title = "" if now is None else f"{now:,.0f}"
        cells.append(_cell(write(now), "" if first else words.change(now, before), title))
    for example in report.latencies:
        entry = next((e for e in variant.latency if e.setting == example.setting), None)
        if entry is None:
            cells.append(_cell("–"))
            continue
        before = base.median_ms(example.setting)
        title = "" if entry.p90_ms is None else f"p90 {words.milliseconds(entry.p90_ms)}"
        change = "" if first else words.change(entry.median_ms, before)
        cells.append(_cell(words.milliseconds(entry.median_ms), change, title))
    chain = " → ".join(stage.name for stage in variant.stages)
    return {"name": variant.name, "chain": chain, "cells": cells}


def _proofs(report: Report) -> dict[str, Any]:
    """How closely each file computes what its network computes, and what of it is integer."""
    kinds = [
        kind
        for kind in ("convs", "linears", "adds")
        if any(v.fusion.get(kind) and f"integer_{kind}" in v.fusion for v in report.variants)
    ]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for variant in report.variants:
        parity, fusion = variant.parity, variant.fusion
        agreement = parity.get("top1_agreement")
        cells = [
            _scientific(parity.get("max_abs_diff")),
            _decibels(parity.get("sqnr_db"), exact=parity.get("max_abs_diff") == 0),
            "–" if agreement is None else f"{100 * agreement:.2f}{words.NARROW}%",
            *(
                f"{fusion.get(f'integer_{kind}', 0)} of {fusion[kind]}" if fusion.get(kind) else "–"
                for kind in kinds
            ),
        ]
        if parity or fusion:
            rows.append({"name": variant.name, "cells": cells})
        names = [
            str(node.get("name") or node.get("type")) for node in fusion.get("float_nodes", ())
        ]
        if names and any(fusion.get(f"integer_{kind}") for kind in kinds):
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            notes.append(f"{variant.name} leaves in float: {', '.join(names[:8])}{more}.")
    titles = {"convs": "convolutions", "linears": "linear layers", "adds": "additions"}
    columns = ["largest difference", "signal to noise", "same answer"]
    columns += [f"integer {titles[kind]}" for kind in kinds]
    return {"columns": columns, "rows": rows, "notes": notes}


def _decibels(value: float | None, *, exact: bool) -> str:
    if exact:
        return "exact"
    return "–" if value is None else f"{value:.0f}{words.NARROW}dB"


def _scientific(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    digits = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}{words.NARROW}×{words.NARROW}10{digits}"


def _pictures(report: Report) -> list[dict[str, str]]:
    pictures = []
    vertical = report.head.title
    interval = (report.head.low, report.head.high)

    def points(costs: list[float | None]) -> list[ChartPoint]:
        return [
            ChartPoint(variant.name, cost, score)
            for variant, cost in zip(report.variants, costs, strict=True)
            if cost is not None and (score := report.score(variant)) is not None
        ]

    fast = points([variant.median_ms(report.setting) for variant in report.variants])
    if len(fast) > 1:
        label = report.latencies[0].label
        picture = scatter(
            fast,
            name="latency",
            horizontal=f"median latency, ms ({label})",
            vertical=vertical,
            interval=interval,
        )
        pictures.append({"title": f"{report.metric_label} and latency", "svg": picture})
    small = points([variant.cost.get("bytes") for variant in report.variants])
    if len(small) > 1:
        unit, scale = ("MB", 1e6) if max(point.cost for point in small) >= 2e6 else ("kB", 1e3)
        picture = scatter(
            small,
            name="size",
            horizontal=f"file, {unit}",
            vertical=vertical,
            scale=scale,
            interval=interval,
        )
        pictures.append({"title": f"{report.metric_label} and size", "svg": picture})
    return pictures


def _metrics(report: Report) -> dict[str, Any]:
    """A table of everything that was scored, where the task has more than the heading metric."""
    names = [
        name
        for name in report.scores
        if name != "loss" and any(name in variant.metrics for variant in report.variants)
    ]
    if len(names) < 2:
        return {"columns": [], "rows": []}
    shown = [report.scores[name] for name in names]
    rows = [
        {"name": v.name, "cells": [score.plain(v.metrics.get(score.name)) for score in shown]}
        for v in report.variants
    ]
    return {"columns": [score.title for score in shown], "rows": rows}


def _estimates(report: Report) -> list[dict[str, Any]]:
    """What arithmetic promises beside what was measured, as fractions of the baseline."""
    base, setting = report.baseline, report.setting
    pairs = (("latency", ("macs", "MACs"), ("bops", "BOPs")), ("file", ("weight_bytes", "weights")))
    rows = []
    for variant in report.variants[1:]:
        groups = []
        for measured, *estimated in pairs:
            bars = [
                (label, variant.cost.get(key), base.cost.get(key), False)
                for key, label in estimated
            ]
            now, before = (
                (variant.median_ms(setting), base.median_ms(setting))
                if measured == "latency"
                else (variant.cost.get("bytes"), base.cost.get("bytes"))
            )
            bars.append((f"{measured}, measured", now, before, True))
            shown = [
                {"label": label, "percent": round(100 * value / against, 1), "measured": proof}
                for label, value, against, proof in bars
                if value is not None and against
            ]
            if any(bar["measured"] for bar in shown) and len(shown) > 1:
                groups.append(shown)
        if groups:
            rows.append({"name": variant.name, "groups": groups})
    return rows


def _runs(report: Report) -> list[tuple[str, StageRun]]:
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


def _curves(report: Report) -> list[dict[str, str]]:
    curves = []
    for number, (variants, stage) in enumerate(_runs(report)):
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


def _channels(report: Report) -> list[dict[str, Any]]:
    result = []
    for variants, stage in _runs(report):
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


def _rounding(report: Report) -> list[dict[str, Any]]:
    """What rounding did to each layer: bars of decibels, histograms of the most damaged ones."""

    def written(row: Mapping[str, Any], key: str) -> str:
        return _decibels(row.get(key), exact=row.get(key) is None)

    result = []
    for number, (variants, stage) in enumerate(_runs(report)):
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


def _gate(gate: Mapping[str, Any]) -> dict[str, Any]:
    value, limit, passed = gate.get("value"), gate.get("limit"), bool(gate.get("passed"))
    written, bound = "not measured", "at most"
    if isinstance(value, int | float) and isinstance(limit, int | float):
        # a report without bounds: which way round follows from the outcome
        bound = "at least" if passed == (value > limit) else "at most"
        written = f"{value:.3g}"
    return {
        "name": str(gate.get("name", "")).replace("_", " "),
        "limit": f"{gate.get('bound') or bound} {words.plain(limit)}",
        "value": written,
        "passed": passed,
    }


def _warnings(report: Report) -> list[str]:
    found: dict[str, dict[str, None]] = {}
    for variant in report.variants:
        for item in variant.latency:
            if item.busy:
                found.setdefault(item.busy, {})[variant.name] = None
        for text in variant.warnings:
            found.setdefault(text, {})[variant.name] = None
    for variants, stage in _runs(report):
        for text in stage.warnings:
            found.setdefault(text, {})[f"{stage.name} ({variants})"] = None
    return [f"{', '.join(names)}: {message}" for message, names in found.items()]


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """What else was recorded: data, model, teachers, environment; as titled lists."""
    recipe = {
        key: report.recipe[key] for key in ("model", "teachers", "measure") if key in report.recipe
    }
    data: dict[str, Any] = {**(report.recipe.get("data") or {}), **report.data}
    sections = {"data": data, **recipe, "environment": {"seed": report.seed, **report.environment}}
    return [
        (title, [(key, words.plain(value)) for key, value in words.flat(section).items()])
        for title, section in sections.items()
        if section
    ]
