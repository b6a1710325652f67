"""A short fuzz of files and recipes: nothing raw, nothing wrong without a word, nothing lost."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
from benchmarks.fuzz import files, recipes
from benchmarks.fuzz.mutations import damaged_bytes, damaged_value
from benchmarks.fuzz.outcomes import Case
from benchmarks.fuzz.running import run

from slimkit.errors import InputError


def test_damaged_files_are_refused_or_give_what_they_gave(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tally = run(files.cases(11, 26, tmp_path))
    assert tally.told == []
    assert tally.counts["typed"] > 10


def test_odd_recipes_are_read_or_refused(tmp_path: Path) -> None:
    tally = run(recipes.cases(11, 60, tmp_path))
    assert tally.told == []
    assert tally.counts["typed"] > 25


def test_outcomes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def act(error: BaseException | None) -> object:
        if error is not None:
            raise error
        return 1

    def endless() -> object:
        while True:
            pass

    monkeypatch.setattr("benchmarks.fuzz.running.SECONDS", 0.2)
    tally = run(
        [
            Case("right", lambda: act(None)),
            Case("wrong", lambda: act(None), lambda value: value == 2),
            Case("typed", lambda: act(InputError("no"))),
            Case("raw", lambda: act(KeyError("no"))),
            Case("lost", lambda: act(files.FileLostError("gone"))),
            Case("hang", endless),
        ]
    )
    assert [outcome for _, outcome, _ in tally.told] == ["wrong", "raw", "lost", "hang"]
    assert tally.cases == 6


def test_damage_is_damage_and_the_same_for_a_seed() -> None:
    content = bytes(range(200))
    for seed in range(50):
        changed = damaged_bytes(content, random.Random(seed))
        assert changed != content
        assert changed == damaged_bytes(content, random.Random(seed))
    value = {"a": [1, 2, {"b": None}]}
    kept = {"a": [1, 2, {"b": None}]}
    for seed in range(50):
        damaged_value(value, random.Random(seed))
        assert value == kept
