"""What page and terminal say beside the figures: certainty, what to deploy, what was in vain."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console

from slimkit.errors import ArtifactError
from slimkit.report import build_html, summary_table, words
from slimkit.report.gains import lost_effort
from slimkit.report.reading import parse_report


def _text(html: str) -> str:
    """Without tags and style; narrow spaces as spaces."""
    body = html[html.index("<body>") :]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body).replace("\u202f", " "))


def _printed(report: dict[str, Any]) -> str:
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        console.print(summary_table(report))
    return captured.get().replace("\u202f", " ")


def _interval(low: float, high: float, **counts: int) -> dict[str, Any]:
    return {"low": low, "high": high, "level": 0.95, "method": "a method", **counts}


@pytest.fixture
def told(quick: dict[str, Any]) -> dict[str, Any]:
    """The example with evidence: pruned is worse beyond doubt, final within the error."""
    rights = {"baseline": (535, 97.9, 99.6), "pruned": (500, 90, 95), "final": (534, 97.6, 99.5)}
    for variant in quick["variants"]:
        right, low, high = rights[variant["name"]]
        own = {"accuracy": _interval(low, high, right=right, of=540)}
        variant["evidence"] = {"samples": 540, "metrics": own}
        for entry in variant["latency"]:
            entry["memory_bytes"] = 7_600_000
    change = _interval(-1.1, 0.7, won=2, lost=3, of=540)
    quick["variants"][2]["evidence"]["change"] = {"accuracy": change}
    change = _interval(-8.1, -4.7, won=0, lost=35, of=540)
    quick["variants"][1]["evidence"]["change"] = {"accuracy": change}
    quick["deploy"] = {
        "variant": "final",
        "why": "the fastest of 2 that meet every gate",
        "left_out": {"pruned": "bytes_ratio is 0.35, required is at most 0.15"},
    }
    quick["again"] = "slimkit run recipe.yaml --out again"
    quick["files"] = {"recipe": "recipe.yaml", "elsewhere": "../../etc/passwd"}
    return quick


def test_counts_and_intervals_stand_behind_the_score(told: dict[str, Any]) -> None:
    text = _text(build_html(told))
    for expected in (
        "534 of 540 right; 95 % interval 97.60 … 99.50 %",
        "change −1.10 … +0.70: within the error of measurement",
        "How sure the accuracy is", "535 of 540", "−8.10 … −4.70",
        "Running it", "7.60 MB", "2.62 k",  # 1000 / 0.382 images per second
    ):  # fmt: skip
        assert expected in text, expected


def test_page_and_terminal_say_the_same(told: dict[str, Any]) -> None:
    page, terminal = _text(build_html(told)), " ".join(_printed(told).split())
    for sentence in (
        "9.3× smaller, 3.2× faster, −0.18 points",
        "534 of 540 right; 95 % interval 97.60 … 99.50 %",
        "change −1.10 … +0.70: within the error of measurement",
        "fastest of 2 that meet every gate",
    ):
        assert sentence in page, sentence
        assert sentence in terminal, sentence


def test_worse_has_its_own_colour_and_doubt_has_none(told: dict[str, Any]) -> None:
    told["variants"][1]["latency"][0]["median_ms"] = 1.5  # slower than the baseline
    html = build_html(told)
    found = re.findall(r'<small class="(\w+)">([^<]*)', html)
    kinds = {text.replace("\u202f", " "): kind for kind, text in found}
    assert kinds["−0.37"] == "worse"  # pruned, beyond the error
    assert kinds["+23.8 %"] == "worse"
    assert kinds["−89.2 %"] == "better"
    assert "−0.18" not in kinds  # final, within the error
    assert html.count("var(--bad)") > build_html_without(told, "pruned").count("var(--bad)")


def build_html_without(report: dict[str, Any], name: str) -> str:
    """The page of the same report without one variant."""
    rest = [variant for variant in report["variants"] if variant["name"] != name]
    return build_html({**report, "variants": rest})


def test_bars_beyond_the_baseline_reach_beyond_its_mark(told: dict[str, Any]) -> None:
    told["variants"][1]["latency"][0]["median_ms"] = 2.424  # 200 %
    html = build_html(told)
    assert re.search(r'class="measured over" style="width: 100.0%".*?left: 50.0%', html)
    assert re.search(r'class="number measured over">200.0 %', html)
    before = build_html_without(told, "pruned")
    assert "over" not in re.findall(r'<i class="([\w ]+)"', before)


def test_unreliable_times_are_marked_where_they_are_told(told: dict[str, Any]) -> None:
    clean = _text(build_html(told))
    assert "unreliable" not in clean.replace("times are unreliable", "unreliable")
    told["variants"][2]["latency"][0]["busy"] = "other processes: times are unreliable"
    page, terminal = _text(build_html(told)), _printed(told)
    assert "3.2× faster (times unreliable)" in page
    assert "* unreliable: other processes" in page
    assert "Its times are unreliable" in page  # what to deploy was chosen by them
    assert "0.382 ms *" in page
    assert "0.382 ms *" in terminal
    assert "3.2× faster (times unreliable)" in terminal


def test_what_to_deploy_is_named_with_its_files_and_what_was_left_out(told: dict[str, Any]) -> None:
    html = build_html(told)
    text = _text(html)
    assert "Deploy final" in text
    assert "The fastest of 2 that meet every gate." in text
    assert "pruned does not: bytes_ratio is 0.35" in text
    assert 'href="variants/final/model.onnx"' in html
    assert "slimkit run recipe.yaml --out again" in text
    assert 'href="recipe.yaml"' in html
    assert "etc/passwd" in text  # told, and not linked
    assert 'href="../' not in html
    told["deploy"] = {"variant": None, "why": "no variant meets every gate", "left_out": {}}
    assert "Nothing to deploy yet" in _text(build_html(told))


@pytest.mark.parametrize("poison", ['"><script>x</script>', "javascript:alert(1)", "\x1b[2J"])
def test_further_texts_are_texts(told: dict[str, Any], poison: str) -> None:
    told["deploy"]["why"] = told["deploy"]["left_out"]["pruned"] = poison
    told["again"] = poison
    told["files"] = {poison: poison}
    told["variants"][0]["evidence"]["metrics"]["accuracy"]["method"] = poison
    told["drawings"] = [
        {"kind": "matrix", "title": poison, "labels": [poison], "counts": [[1]], "rows": poison,
         "columns": poison, "note": poison},
        {"kind": "gallery", "title": poison, "cells": [{"text": poison, "note": poison}]},
        {"kind": "table", "title": poison, "columns": [poison], "rows": [[poison]], "note": poison},
    ]  # fmt: skip
    html = build_html(told)
    assert "<script" not in html
    assert 'href="javascript' not in html
    assert "\x1b" not in html
    assert "\x1b" not in _printed(told)


@pytest.mark.parametrize("broken", [{"low": "x", "high": 1}, {"low": None, "high": 1}])
def test_limits_that_are_no_numbers_are_an_error(told: dict[str, Any], broken: Any) -> None:
    told["variants"][0]["evidence"]["metrics"]["accuracy"] = broken
    with pytest.raises(ArtifactError, match="damaged"):
        build_html(told)


def _chain(name: str, stages: list[str], ms: float, size: int, accuracy: float) -> dict[str, Any]:
    return {
        "name": name,
        "metrics": {"accuracy": accuracy},
        "cost": {"bytes": size},
        "latency": [{"backend": "onnxruntime", "median_ms": ms}],
        "stages": [{"name": stage, "type": stage} for stage in stages],
    }


def _effort(*variants: dict[str, Any]) -> list[str]:
    return [
        text.replace("\u202f", " ") for text in lost_effort(parse_report({"variants": variants}))
    ]


BASE = _chain("base", ["train"], 1.0, 1000, 93.0)
INT8 = _chain("int8", ["train", "ptq"], 0.534, 300, 92.9)


def test_stages_that_gained_no_time_over_leaving_them_out_are_named() -> None:
    both = _chain("both", ["train", "prune", "tune", "ptq"], 0.567, 180, 92.4)
    assert _effort(BASE, INT8, both) == [
        "both: prune → tune gained no time over leaving them out, as int8 does: "
        "0.567 ms against 0.534 ms, 180 B against 300 B, −0.50 points"
    ]
    larger = _chain("both", ["train", "prune", "ptq"], 0.54, 310, 92.4)
    assert "both: prune gained nothing over leaving it out" in _effort(BASE, INT8, larger)[0]


def test_stages_that_were_worth_it_are_not() -> None:
    both = _chain("both", ["train", "prune", "ptq"], 0.4, 180, 92.4)
    assert _effort(BASE, INT8, both) == []
    longer = _chain("longer", ["train", "tune"], 1.0, 1000, 94.0)  # trains on: the score is better
    assert _effort(BASE, longer) == []
    vain = _chain("longer", ["train", "tune"], 1.0, 1000, 92.0)
    assert "longer: tune gained nothing" in _effort(BASE, vain)[0]


def test_metrics_with_a_small_first_letter_keep_it() -> None:
    assert words.heading("mAP and latency") == "mAP and latency"
    assert words.heading("accuracy and size") == "Accuracy and size"
    assert words.heading("") == ""
