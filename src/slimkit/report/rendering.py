"""``report.html``: one self-contained page, built from ``report.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimkit.artifact import PathLike, read_json, write_text
from slimkit.errors import ArtifactError
from slimkit.report import figures, words
from slimkit.report.charts import ChartPoint, scatter
from slimkit.report.drawings import drawn
from slimkit.report.gains import lost_effort
from slimkit.report.reading import Report, Variant, parse_report
from slimkit.report.stage_sections import channels, rounding, stage_runs, training

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
        "headline": figures.headline(parsed),
        "columns": figures.columns(parsed),
        "rows": [figures.row(parsed, variant) for variant in parsed.variants],
        "running": figures.running(parsed),
        "certainty": figures.certainty(parsed),
        "deploy": figures.deployment(parsed),
        "effort": lost_effort(parsed),
        "proofs": _proofs(parsed),
        "pictures": _pictures(parsed),
        "metrics": _metrics(parsed),
        "drawings": drawn(parsed),
        "estimates": _estimates(parsed),
        "curves": training(parsed),
        "channels": channels(parsed),
        "rounding": rounding(parsed),
        "gates": [figures.gate(gate) for gate in parsed.gates],
        "warnings": _warnings(parsed),
        "facts": _facts(parsed),
    }


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
            words.decibels(parity.get("sqnr_db"), exact=parity.get("max_abs_diff") == 0),
            "–" if agreement is None else f"{100 * agreement:.2f}{words.NARROW}%",
            *(
                f"{fusion.get(f'integer_{kind}', 0)} of {fusion[kind]}" if fusion.get(kind) else "–"
                for kind in kinds
            ),
        ]
        if parity or fusion:
            rows.append({"name": variant.name, "chain": "", "cells": cells})
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
            ChartPoint(variant.name, cost, score, _limits(report, variant))
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
        title = words.heading(f"{report.metric_label} and latency")
        pictures.append({"title": title, "svg": picture, "doubt": report.unreliable or ""})
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
        title = words.heading(f"{report.metric_label} and size")
        pictures.append({"title": title, "svg": picture, "doubt": ""})
    return pictures


def _limits(report: Report, variant: Variant) -> tuple[float, float] | None:
    found = variant.intervals.get(report.metric)
    return None if found is None else (found.low, found.high)


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
    rows: list[dict[str, Any]] = []
    for variant in report.variants:
        cells = [
            figures.metric_cell(score, variant, report.baseline if rows else None)
            for score in shown
        ]
        rows.append({"name": variant.name, "chain": "", "cells": cells})
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
            shown: list[dict[str, Any]] = [
                {"label": label, "percent": round(100 * value / against, 1), "measured": proof}
                for label, value, against, proof in bars
                if value is not None and against
            ]
            if any(bar["measured"] for bar in shown) and len(shown) > 1:
                groups.append(shown)
        if groups:
            # what exceeds the baseline is drawn beyond it: the scale grows, a line marks 100 %
            full = max(100.0, *(bar["percent"] for group in groups for bar in group))
            for bar in (bar for group in groups for bar in group):
                bar |= {
                    "width": round(100 * bar["percent"] / full, 2),
                    "over": bar["percent"] > 100,
                }
            mark = round(100 * 100 / full, 2)
            rows.append(
                {"name": variant.name, "groups": groups, "mark": mark if full > 100 else None}
            )
    return rows


def _warnings(report: Report) -> list[str]:
    found: dict[str, dict[str, None]] = {}
    for variant in report.variants:
        for item in variant.latency:
            if item.busy:
                found.setdefault(f"* {item.busy}", {})[variant.name] = None
        for text in variant.warnings:
            found.setdefault(text, {})[variant.name] = None
    for variants, stage in stage_runs(report):
        for text in stage.warnings:
            found.setdefault(text, {})[f"{stage.name} ({variants})"] = None
    return [
        f"{'* ' * message.startswith('* ')}{', '.join(names)}: {message.removeprefix('* ')}"
        for message, names in found.items()
    ]


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
