from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slimkit.artifact import write_json
from slimkit.errors import ArtifactError
from slimkit.report import build_html, words, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
RESOURCES = {"src", "href", "action", "data", "poster", "srcset"}


class Page(HTMLParser):
    """Checks nesting while reading, and keeps text, identifiers and references."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.references: list[str] = []
        self.svgs = 0
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.references += [value or "" for key, value in attrs if key in RESOURCES]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data.replace("\u202f", " ")


def test_page_is_well_formed_and_self_contained(html: str) -> None:
    page = Page(html)
    assert "://" not in html, "a report refers to nothing outside"
    assert all(not reference.startswith("//") for reference in page.references)
    assert "<script" not in html
    assert "@import" not in html


def test_identifiers_in_the_pictures_are_unique_and_resolve(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    assert used
    assert used <= set(page.ids)


def test_page_shows_every_figure_with_its_change(html: str) -> None:
    text = Page(html).text
    for expected in (
        "9.3× smaller, 3.2× faster, −0.18 points",  # 1103214/118731, 1.212/0.382, 98.89-99.07
        "98.89", "94.0 k", "15.9 M", "119 kB", "0.382 ms",
        "−65.5 %", "−60.8 %", "−89.2 %", "−68.5 %",
        "21 of 21", "38 dB", "99.81 %", "3.1 × 10⁻⁶",
        "accuracy drop", "layer3.1.conv1", "40 / 64", "distill.0.temperature", "avx512, vnni",
    ):  # fmt: skip
        assert expected in text, expected


def test_pictures_take_the_colours_of_the_page(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 2 + 3  # two scatters, three trained stages
    for drawing in drawings:
        assert "var(--accent)" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b", drawing), "a colour that ignores dark mode"


def test_a_single_epoch_makes_no_curve(report: dict[str, Any]) -> None:
    for variant in report["variants"]:
        for stage in variant["stages"]:
            stage["history"] = stage.get("history", [])[:1]
    page = Page(build_html(report))
    assert page.svgs == 2
    assert "validation images" not in page.text


def test_each_stage_run_is_shown_once_though_variants_share_it(html: str) -> None:
    text = Page(html).text
    assert text.count("train in baseline, pruned, final") == 1
    assert text.count("prune in pruned, final") == 1


def test_a_failed_gate_is_marked(quick: dict[str, Any]) -> None:
    quick["gates"][0].update(value=1.4, passed=False)
    html = build_html(quick)
    assert html.count('class="fail"') == 1
    assert html.count('class="pass"') == 2
    assert "1.4, at most 1: missed" in re.sub(r"<[^>]+>", "", html)


@pytest.mark.parametrize(
    ("value", "limit", "passed", "said"),
    [
        (98.9, 98.0, True, "98.9, at least 98"),
        (97.9, 98.0, False, "97.9, at least 98: missed"),
        (0.2, 1.0, True, "0.2, at most 1"),
        (None, 30.0, False, "not measured, at most 30: missed"),
    ],
)
def test_a_gate_says_which_way_round_it_is(
    quick: dict[str, Any], value: float | None, limit: float, passed: bool, said: str
) -> None:
    quick["gates"] = [{"name": "gate", "limit": limit, "value": value, "passed": passed}]
    assert said in Page(build_html({**quick, "variants": quick["variants"][:1]})).text


def test_a_smoke_run_cannot_be_taken_for_a_result(quick: dict[str, Any], html: str) -> None:
    assert "its figures mean nothing" not in html
    assert "its figures mean nothing" in build_html({**quick, "smoke": True})


def test_a_disturbed_measurement_is_said_in_the_headline_and_once_below(
    quick: dict[str, Any],
) -> None:
    for variant in quick["variants"]:
        for entry in variant["latency"]:
            entry["busy"] = "the CPU was busy"
    text = Page(build_html(quick)).text
    assert "baseline, pruned, final: the CPU was busy" in text
    assert "* unreliable: the CPU was busy" in text
    assert text.count("the CPU was busy") == 2


def test_warnings_and_measured_latency_are_told_once(quick: dict[str, Any]) -> None:
    quick["variants"][-1]["warnings"] = ["MACs fell and milliseconds did not"]
    for variant in quick["variants"]:
        for stage in variant["stages"]:
            if stage["name"] == "prune":
                stage["warnings"] = ["the stage has its own"]
                stage["measured"] = {
                    "backend": "onnxruntime",
                    "threads": 1,
                    "measured_ms": [7.1, 4.2],
                }
    text = Page(build_html(quick)).text
    assert "final: MACs fell and milliseconds did not" in text
    assert text.count("the stage has its own") == 1
    told = text.replace("\u202f", " ")
    assert "Chosen by measuring: 7.10 ms → 4.20 ms (−40.8 %) in onnxruntime, 1 thread." in told


def test_what_stays_in_float_is_named(quick: dict[str, Any]) -> None:
    nodes = [{"name": "fc", "type": "Gemm"}, {"name": "", "type": "Softmax"}]
    for variant in quick["variants"]:
        variant["fusion"]["float_nodes"] = nodes
    text = Page(build_html(quick)).text
    assert "final leaves in float: fc, Softmax." in text
    assert "baseline leaves in float" not in text


@pytest.mark.parametrize(
    "missing",
    ["latency", "parity", "fusion", "stages", "files", "torch_metrics", "cost", "metrics"],
)
def test_page_does_without_a_missing_piece(quick: dict[str, Any], missing: str) -> None:
    for variant in quick["variants"]:
        del variant[missing]
    assert Page(build_html(quick)).text.count("final") >= 1


def test_rounding_of_each_layer_is_shown_with_histograms(quick: dict[str, Any]) -> None:
    counts = {"low": -0.2, "high": 0.3, "before": [1, 0, 5, 2], "after": [0, 2, 5, 1]}
    layer = {"bits": 4, "weight_sqnr_db": 18.5, "output_sqnr_db": None}
    quick["variants"][-1]["stages"][-1]["rounding"] = {
        "layers": [
            {"layer": "conv1", "sqnr_db": 36.4, **layer},
            {"layer": "<b>fc", "sqnr_db": None, **layer},
        ],
        "histograms": [{"layer": "<b>fc", "weights": counts, "outputs": counts}],
    }
    plain = Page(build_html({**quick, "variants": quick["variants"][:-1]}))
    html = build_html(quick)
    page = Page(html)
    assert "What rounding does to each layer" not in plain.text
    assert "What rounding does to each layer" in page.text
    assert page.svgs == plain.svgs + 1
    assert len(set(page.ids)) == len(page.ids)
    assert "36 dB" in page.text.replace("\u202f", " ").replace("\xa0", " ")
    assert "exact" in page.text
    assert "<b>fc" in page.text
    assert "weights and outputs of &lt;b&gt;fc" in html


def test_page_of_a_single_bare_variant(report: dict[str, Any]) -> None:
    bare = {"schema_version": 1, "variants": [{"name": "baseline"}]}
    assert "one variant" in Page(build_html(bare)).text
    alone = {**report, "variants": report["variants"][:1], "gates": []}
    page = Page(build_html(alone))
    assert "99.07 % accuracy, 1.10 MB" in page.text
    assert page.svgs == 1  # the training curve; one point makes no scatter


def test_names_from_the_recipe_are_escaped(report: dict[str, Any]) -> None:
    del report["variants"][:2]
    report["name"] = report["variants"][-1]["name"] = "<script>alert(1)</script> & <b>"
    html = build_html(report)
    assert "<script" not in html
    assert "<script>alert(1)</script> & <b>" in Page(html).text


def test_building_does_not_change_the_report_and_is_repeatable(
    report: dict[str, Any], html: str
) -> None:
    before = copy.deepcopy(report)
    assert build_html(report) == html
    assert report == before


def test_write_report_reads_json_and_leaves_a_page(
    report: dict[str, Any], html: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "report.json", report)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    assert page.read_text(encoding="utf-8") == html


@pytest.mark.parametrize("content", [{}, [], {"variants": []}, {"variants": [{}]}, "text"])
def test_what_is_no_report_is_refused(content: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", content)
    with pytest.raises(ArtifactError, match="report"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_a_newer_version_is_refused(report: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="update slimkit"):
        build_html({**report, "schema_version": 99})


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("variants/a b/model.onnx", "variants/a%20b/model.onnx"),
        ("variants/50%/#1?.onnx", "variants/50%25/%231%3F.onnx"),
        ("javascript:alert(2)", ""),
        ("https://example.org/a", ""),
        ("//example.org/a", ""),
        ("/etc/passwd", ""),
        ("variants/../../a", ""),
        ("..", ""),
        ("a\\..\\b", ""),
        ("java\nscript", ""),
        (".", "."),
        ("", ""),
    ],
)
def test_links_lead_to_files_of_the_run_only(path: str, address: str) -> None:
    assert words.link(path) == address
    html = build_html({"variants": [{"name": "a", "files": {"model": path}}]})
    assert [r for r in Page(html).references if not r.startswith("#")] == [address] * bool(address)


def _poisoned(value: Any, poison: str) -> Any:
    """The same report with all texts, and all names in it that are free, made hostile."""
    if isinstance(value, dict):
        free = {"metrics", "settings", "files"}
        return {
            key: {f"{k}{poison}": v for k, v in item.items()}
            if key in free and isinstance(item, dict) and key != "metrics"
            else _poisoned(item, poison)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_poisoned(item, poison) for item in value]
    return value + poison if isinstance(value, str) else value


@pytest.mark.parametrize(
    "poison", ['"><script>alert(1)</script>', "' onload='alert(1)", "]]><b>", "$x$ $\\frac$"]
)
def test_texts_of_a_report_are_text_everywhere_in_the_page(
    report: dict[str, Any], html: str, poison: str
) -> None:
    class Tags(Page):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            super().handle_starttag(tag, attrs)
            self.kinds.update({tag} | {f"{tag}.{key}" for key, _ in attrs})

        kinds: set[str] = set()  # noqa: RUF012 - replaced below

    def kinds(page: str) -> set[str]:
        reader = type("Reader", (Tags,), {"kinds": set()})
        found: set[str] = reader(page).kinds
        return found

    page = build_html(_poisoned(report, poison))
    assert poison in Page(page).text
    assert kinds(page) <= kinds(html) | {"td.title"}


def test_what_a_terminal_would_obey_is_shown(report: dict[str, Any]) -> None:
    for variant in report["variants"]:
        variant["name"] += "\x1b]0;title\x07\x9b2J\u202e"
    html = build_html(report)
    assert not set("\x1b\x07\x9b\u202e") & set(html)
    assert "␛]0;title␇" in html


@pytest.mark.parametrize(
    "broken",
    [
        {"channels": [{"layer": "a", "kept": "x", "total": 3}]},
        {"channels": [{"layer": "a", "total": 3}]},
        {"history": [{"epoch": "x", "loss": 1}, {"epoch": 2, "loss": 1}]},
        {"rounding": {"layers": [{"layer": "a", "sqnr_db": "x"}]}},
        {"seconds": "x"},
    ],
)
def test_numbers_that_are_none_are_an_error(report: dict[str, Any], broken: dict[str, Any]) -> None:
    report["variants"][-1]["stages"][-1] |= broken
    with pytest.raises(ArtifactError, match="damaged"):
        build_html(report)
