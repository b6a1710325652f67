"""A budget of minutes, lines within long epochs, and processors that others use."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch import nn
from torch.nn import functional as F

from slimkit.tasks.data import ArrayLoader
from slimkit.train import TrainSettings, fit
from slimkit.train import progress as showing
from slimkit.train.budget import Budget, ProcessorShare


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every look at the clock take so long."""
    clock = itertools.count()
    monkeypatch.setattr(
        "slimkit.train.running.time.perf_counter", lambda: seconds * float(next(clock))
    )


def train(network: nn.Module, data: Any, **kwargs: Any) -> Any:
    settings = kwargs.pop("settings")
    return fit(network, data, loss_fn=F.cross_entropy, settings=settings, **kwargs)


def test_as_many_epochs_as_fit_are_planned_from_the_first_steps() -> None:
    budget = Budget(minutes=10, steps_per_epoch=100, most=100 * 50)
    assert not budget.may_judge(1.0, 5)
    assert budget.may_judge(6.0, 10)
    assert not budget.may_judge(7.0, 11)  # once
    # 1 s a step, with its evaluation 110 s an epoch: five fit into 600 s
    assert budget.after_steps(10, 10.0) == 500
    assert budget.after_steps(10, 0.01) == 100 * 50  # no more than without a budget
    assert budget.after_steps(10, 110.0) == 49  # not even one: a part of it
    assert not Budget(None, 100, 5000).may_judge(100.0, 100)


def test_the_plan_follows_what_epochs_take_and_never_stretches_a_schedule_that_falls() -> None:
    budget = Budget(minutes=10, steps_per_epoch=100, most=5000)
    assert budget.after_epochs(1, 60.0, 500) == 1000  # faster than thought: 1 + 9
    assert budget.after_epochs(1, 200.0, 500) == 300  # slower: 1 + 2
    assert budget.after_epochs(4, 240.0, 500) == 500  # in its second half it stays
    assert budget.after_epochs(4, 580.0, 500) == 400  # but stops before it is too late
    assert budget.after_epochs(0, 0.0, 500) == 500


def test_a_training_ends_at_an_epoch_within_its_minutes_with_its_schedule_at_its_end(
    network: nn.Sequential, data: ArrayLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticking(monkeypatch, 1.0)
    settings = TrainSettings(epochs=50, minutes=3, lr=0.05, schedule="linear", precision="fp32")
    history = train(network, data, settings=settings, progress=False)
    epochs = len(history.epochs)
    assert 1 < epochs < 50
    assert history.seconds <= 180
    assert history.steps == epochs * len(data)
    assert history.budget == {"minutes": 3, "epochs": epochs, "of": 50}
    assert history.epochs[-1]["lr"] < 0.05 * 2 / epochs


def test_a_resumed_training_keeps_to_what_is_left_of_its_minutes(
    network: nn.Sequential, data: ArrayLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from slimkit.train import Callback

    class Killer(Callback):
        def on_epoch_end(self, context: Any) -> None:
            if context.epoch == 2:
                raise KeyboardInterrupt

    ticking(monkeypatch, 1.0)
    settings = TrainSettings(epochs=50, minutes=3, lr=0.05, precision="fp32")
    kwargs = {"settings": settings, "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    with pytest.raises(KeyboardInterrupt):
        train(network, data, callbacks=[Killer()], **kwargs)
    history = train(network, data, callbacks=[Callback()], **kwargs)
    assert history.seconds <= 180
    assert [record["epoch"] for record in history.epochs] == list(range(len(history.epochs)))


def test_without_minutes_nothing_is_said_of_a_budget(
    network: nn.Sequential, data: ArrayLoader
) -> None:
    settings = TrainSettings(epochs=1, precision="fp32")
    assert train(network, data, settings=settings, progress=False).budget == {}


def test_a_long_epoch_has_lines_of_its_own_where_there_is_no_bar(
    network: nn.Sequential,
    data: ArrayLoader,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = TrainSettings(epochs=2, precision="fp32")
    train(network, data, settings=settings, label="short")
    assert "step" not in capsys.readouterr().err
    monkeypatch.setattr(showing, "LINE_SECONDS", 0.0)
    train(network, data, settings=settings, label="long")
    lines = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert len(lines) == 2 * len(data)
    assert lines[0].startswith(f"long step 1/{2 * len(data)} loss ")
    assert "img/s" in lines[0]
    assert lines[0].endswith("left")


class Clocks:
    """Wall and CPU time of a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        monkeypatch.setattr("slimkit.train.budget.time.perf_counter", lambda: self.wall)
        monkeypatch.setattr("slimkit.train.budget.time.thread_time", lambda: self.cpu)

    def run(self, wall: float, cpu: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


def test_a_processor_that_others_use_is_told_once_and_waiting_for_data_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks = Clocks(monkeypatch)

    def slow_data() -> Any:
        for _ in range(4):
            clocks.run(wall=100.0, cpu=0.1)
            yield None

    alone = ProcessorShare()
    for _ in alone.without_waiting(slow_data()):
        clocks.run(wall=5.0, cpu=4.9)
    assert alone.value == pytest.approx(0.98)
    assert not alone.slow()
    crowded = ProcessorShare()
    told = []
    for _ in crowded.without_waiting(slow_data()):
        clocks.run(wall=5.0, cpu=2.0)
        told.append(crowded.slow())
    assert crowded.value == pytest.approx(0.4)
    assert told == [False, True, False, False]
    assert "40% of the time" in crowded.warning()
