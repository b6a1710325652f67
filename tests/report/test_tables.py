from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from slimkit.artifact import write_json
from slimkit.errors import ArtifactError
from slimkit.report import compare, summary_table, words
from slimkit.report.charts import _spread


def _printed(renderable: RenderableType, width: int = 160) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().replace("\u202f", " ")


def test_summary_has_every_figure_with_its_change_and_the_verdict(report: dict[str, Any]) -> None:
    text = _printed(summary_table(report), width=80)  # fits an ordinary terminal
    row = next(line for line in text.splitlines() if "final" in line)
    below = text.splitlines()[text.splitlines().index(row) + 1]
    for value, change in (("98.89", "−0.18"), ("119 kB", "−89.2 %"), ("0.290 ms", "−77.8 %")):
        assert value in row
        assert change in below
    assert "9.3× smaller, 3.2× faster, −0.18 points" in text


def test_summary_of_variants_without_measurements() -> None:
    text = _printed(summary_table({"variants": [{"name": "[red]a"}, {"name": "b"}]}))
    assert "[red]a" in text
    assert "nothing was measured" in text


def test_a_report_compared_with_itself_has_no_changes(report: dict[str, Any]) -> None:
    same = compare(report, report)
    assert {row[-1] for row in same.rows} == {"±0"}
    assert same.settings == ()


def test_comparison_names_what_was_set_and_what_came_of_it(
    report: dict[str, Any], tmp_path: Path
) -> None:
    other = copy.deepcopy(report)
    other["variants"][-1]["stages"][1]["settings"]["macs"] = 0.7
    other["variants"][-1]["metrics"]["accuracy"] = 98.39
    other["variants"][-1]["latency"][0]["median_ms"] = 0.191
    other["variants"][1]["name"] = "slimmer"
    write_json(tmp_path / "report.json", other)
    found = compare(report, tmp_path)
    assert ("final", "accuracy, %", "98.89", "98.39", "−0.50") in found.rows
    assert ("final", "onnxruntime, 1 thread") in [row[:2] for row in found.rows]
    assert found.settings == (("stages.prune.macs", "0.6", "0.7"),)
    assert (found.only_a, found.only_b) == ((), ())  # they are at the same place
    assert "pruned / slimmer" in {row[0] for row in found.rows}
    other["variants"].append({**other["variants"][1], "name": "smallest"})
    write_json(tmp_path / "report.json", other)
    longer = compare(report, tmp_path)
    assert (longer.only_a, longer.only_b) == ((), ("smallest",))
    for text in (longer.markdown(), _printed(longer)):
        assert "only in B: smallest" in text
    for text in (found.markdown(), _printed(found)):
        assert "stages.prune.macs" in text


def test_any_number_of_reports_stand_side_by_side(report: dict[str, Any]) -> None:
    second, third = copy.deepcopy(report), copy.deepcopy(report)
    third["variants"][-1]["metrics"]["accuracy"] = 97.89
    del second["variants"][-1]["latency"]
    found = compare(report, second, third)
    assert found.names == ("A", "B", "C")
    assert ("final", "accuracy, %", "98.89", "98.89", "97.89", "−1.00") in found.rows
    times = [row for row in found.rows if row[:2] == ("final", "onnxruntime, 1 thread")]
    assert [row[3] for row in times] == ["–"]
    assert "A → C" in found.markdown()


def test_comparing_with_a_missing_file_names_it(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere\.json"):
        compare(report, tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.count(999), "999"),
        (words.count(272_186), "272 k"),
        (words.count(999_960), "1.00 M"),
        (words.size(118_731), "119 kB"),
        (words.size(0), "0 B"),
        (words.milliseconds(0.01234), "0.0123 ms"),
        (words.milliseconds(12.34), "12.3 ms"),
        (words.points(-0.004), "±0"),
        (words.points(1.0), "+1.00"),
        (words.change(50, 200), "−75.0 %"),
        (words.change(1, None), ""),
        (words.factor(25, 100, "smaller", "larger"), "4.0× smaller"),
        (words.factor(100, 25, "smaller", "larger"), "4.0× larger"),
        (words.factor(100, 101, "faster", "slower"), "no faster"),
        (words.plain({"a": [1, 2.50], "b": None}), "a 1, 2.5, b none"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written.replace("\u202f", " ") == expected


@given(st.floats(min_value=0, max_value=1e15))
def test_written_counts_are_short_and_close(value: float) -> None:
    text = words.count(value)
    number, _, unit = text.partition("\u202f")
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert float(number) * factor == pytest.approx(value, rel=0.006, abs=0.5)
    assert len(number) <= 4


@given(st.lists(st.floats(min_value=0, max_value=100), min_size=1, max_size=8))
def test_labels_keep_their_distance_and_order(values: list[float]) -> None:
    places = _spread(values, 5.0)
    order = sorted(range(len(values)), key=lambda number: values[number])
    for low, high in itertools.pairwise(order):
        assert places[high] - places[low] >= 5.0 - 1e-6
    if all(abs(a - b) >= 5 for n, a in enumerate(values) for b in values[:n]):
        assert places == pytest.approx(values)


def test_names_never_command_the_terminal(report: dict[str, Any]) -> None:
    report["variants"][-1]["name"] = "final\x1b[2J\x9b2J"
    report["variants"][-1]["latency"][0]["backend"] = "[red]\x1b[31m"
    for thing in (summary_table(report), compare(report, report)):
        text = _printed(thing)
        assert not {"\x1b", "\x9b"} & set(text)
        assert "[red]␛[31m" in text
    assert "\x1b" not in compare(report, report).markdown()
