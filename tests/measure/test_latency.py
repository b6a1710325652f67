from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slimkit.errors import ArtifactError, InputError, UnknownNameError
from slimkit.measure import latency
from slimkit.measure.latency import Timing, benchmark, benchmark_interleaved, random_feeds
from slimkit.runtime.exporting import export
from slimkit.runtime.sessions import open_session


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


class Clock:
    """Time that passes only when a model says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    process_time = perf_counter


class Takes(nn.Module):
    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock = clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.clock.now += self.seconds
        self.clock.log.append(self.seconds)
        return x


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latency")
    made = {"narrow": folder / "narrow.onnx", "wide": folder / "wide.onnx"}
    for name, width in (("narrow", 4), ("wide", 64)):
        export(Net(width), made[name], torch.randn(1, 3, 24, 24))
    return made


def test_statistics_are_ordered_and_counted(paths: dict[str, Path]) -> None:
    timing = benchmark(paths["narrow"], runs=20, batch=2)
    assert 0 < timing.min_ms <= timing.median_ms <= timing.p90_ms
    assert timing.min_ms <= timing.mean_ms
    assert (timing.runs, timing.batch, timing.threads) == (20, 2, 1)
    assert timing.backend == "onnxruntime"


def test_given_inputs_decide_the_batch(paths: dict[str, Path]) -> None:
    images = torch.randn(3, 3, 24, 24)
    for inputs in (images, (images,), images.numpy(), {"input": images.numpy()}):
        assert benchmark(paths["narrow"], inputs=inputs, runs=2).batch == 3
    with pytest.raises(InputError, match="inptu"):
        benchmark(paths["narrow"], inputs={"inptu": images.numpy()})


def test_known_durations_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    timings = benchmark_interleaved(
        {"slow": Takes(0.01, clock), "fast": Takes(0.001, clock)},
        backend="torch",
        inputs=torch.zeros(1),
        warmup=1,
        seconds=0.2,
    )
    assert timings["slow"].median_ms == pytest.approx(10)
    assert timings["fast"].p90_ms == pytest.approx(1)
    assert (timings["slow"].runs, timings["fast"].runs) == (20, 200)
    first_slow, first_fast = (clock.log.index(seconds) for seconds in (0.01, 0.001))
    turns = [
        seconds
        for seconds, before in zip(clock.log[1:], clock.log, strict=False)
        if seconds != before
    ]
    assert len(turns) >= 6, "they take turns"
    assert {first_slow, first_fast} == {0, 1}


def test_a_wider_network_takes_longer_in_turns(paths: dict[str, Path]) -> None:
    timings = benchmark_interleaved(paths, seconds=0.2)
    assert timings["wide"].min_ms > 2 * timings["narrow"].min_ms


def test_openvino_is_timed_the_same_way(paths: dict[str, Path]) -> None:
    pytest.importorskip("openvino", reason="the openvino extra is not installed")
    assert benchmark(paths["narrow"], backend="openvino", runs=5).median_ms > 0


def test_torch_threads_and_flags_are_restored() -> None:
    model = Takes(0.0, Clock()).train()
    before = torch.get_num_threads()
    benchmark(model, backend="torch", inputs=torch.zeros(1), threads=before + 1, runs=1)
    assert torch.get_num_threads() == before
    assert model.training


def test_random_inputs_fit_types_and_open_batch(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(2, 3)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.embed(ids).sum(1) * mask

    path = tmp_path / "model.onnx"
    export(Tokens(), path, (torch.zeros(1, 7, dtype=torch.int64), torch.ones(1, 1)))
    ids, mask = random_feeds(open_session(path), 4)
    assert (ids.shape, ids.dtype) == ((4, 7), np.int64)
    assert (mask.shape, mask.dtype) == ((4, 1), np.float32)
    assert benchmark(path, batch=4, runs=2).runs == 2


def test_other_processes_are_noticed(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.process_time
    monkeypatch.setattr(latency, "_busy_seconds", lambda: clock() + 0.9 * time.perf_counter())
    assert "0.9 of these cores" in str(benchmark(paths["narrow"], seconds=0.2).busy)
    monkeypatch.setattr(latency, "_busy_seconds", clock)
    assert benchmark(paths["narrow"], seconds=0.2).busy is None


def test_timings_are_json_and_print(paths: dict[str, Path]) -> None:
    timing = Timing("onnxruntime", 2, 1, 1.23456789, 2.0, 1.0, 1.5, 10, "busy")
    assert timing.to_json()["median_ms"] == 1.2346
    assert str(timing) == (
        "1.235 ms median, 2.000 ms p90 (10 runs, onnxruntime, 2 threads, batch 1); busy"
    )


def test_wrong_arguments_name_themselves(paths: dict[str, Path], tmp_path: Path) -> None:
    fixed = tmp_path / "fixed.onnx"
    export(Net(4), fixed, torch.randn(2, 3, 8, 8), dynamic_batch=False)
    with pytest.raises(InputError, match="batch of 2 only"):
        benchmark(fixed, batch=1)
    with pytest.raises(InputError, match="threads"):
        benchmark(fixed, threads=0)
    with pytest.raises(InputError, match="seconds"):
        benchmark(fixed, seconds=0)
    with pytest.raises(InputError, match="inputs"):
        benchmark(Net(4), backend="torch")
    with pytest.raises(InputError, match="torch"):
        benchmark(Net(4))
    with pytest.raises(InputError, match="module"):
        benchmark(fixed, backend="torch")
    with pytest.raises(UnknownNameError):
        benchmark(fixed, backend="tensorrt")
    with pytest.raises(ArtifactError):
        benchmark(tmp_path / "absent.onnx")
