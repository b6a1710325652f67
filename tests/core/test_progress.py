from __future__ import annotations

import sys

import pytest

from slimkit import progress
from slimkit.progress import ProgressDisplay


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def run(clock: Clock, seconds: float, steps: int = 20, *, enabled: bool = True) -> None:
    with ProgressDisplay(steps, 0, label="work", enabled=enabled, patience=10) as show:
        for step in range(1, steps + 1):
            clock.now += seconds
            show.step(step, f"layer{step}")


def test_short_work_shows_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 0.4)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_announced_early_and_says_what_is_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 4.0)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "work 3/20 layer3, about 68 s left"
    assert len(lines) == 6  # one in ten seconds at most, of steps of four
    run(clock, 30.0)
    assert "work 1/20 layer1, about 10 min left" in capsys.readouterr().err


def test_nothing_is_shown_where_it_is_not_wanted(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 30.0, enabled=False)
    assert capsys.readouterr() == ("", "")


def test_the_library_for_bars_is_loaded_when_there_is_something_to_show() -> None:
    before = set(sys.modules)
    with ProgressDisplay(2, 0, label="work", enabled=True, patience=10) as show:
        show.step(1, "")
    assert not {name for name in set(sys.modules) - before if name.startswith("rich")}
