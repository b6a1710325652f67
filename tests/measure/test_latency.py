from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slimkit.errors import ArtifactError, InputError, UnknownNameError
from slimkit.measure import latency
from slimkit.measure.latency import Timing, benchmark, benchmark_interleaved, random_feeds
from slimkit.runtime.sessions import open_session


def write_conv(path: Path, width: int, *, batch: int | str = "batch", size: int | str = 24) -> Path:
    """Two convolutions of ``width`` channels, written by hand: exporting takes longer."""
    shape = helper.make_tensor_value_info
    weights = [
        numpy_helper.from_array(np.ones((width, depth, 3, 3), np.float32), f"w{depth}")
        for depth in {3, width}
    ]
    nodes = [
        helper.make_node("Conv", ["input", "w3"], ["hidden"]),
        helper.make_node("Conv", ["hidden", f"w{width}"], ["output"]),
    ]
    return write(
        path,
        nodes,
        [shape("input", TensorProto.FLOAT, [batch, 3, size, size])],
        [shape("output", TensorProto.FLOAT, None)],
        weights,
    )


def write(path: Path, nodes: list[Any], *rest: Any) -> Path:
    graph = helper.make_graph(nodes, "main", *rest)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


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
    return {
        "narrow": write_conv(folder / "narrow.onnx", 4),
        "wide": write_conv(folder / "wide.onnx", 64),
    }


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
    shape = helper.make_tensor_value_info
    path = write(
        tmp_path / "model.onnx",
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Mul", ["rows", "mask"], ["output"]),
        ],
        [
            shape("ids", TensorProto.INT64, ["batch", 7]),
            shape("mask", TensorProto.FLOAT, ["batch", 1]),
        ],
        [shape("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(2, np.float32), "table")],
    )
    ids, mask = random_feeds(open_session(path), 4)
    assert (ids.shape, ids.dtype) == ((4, 7), np.int64)
    assert (mask.shape, mask.dtype) == ((4, 1), np.float32)
    assert benchmark(path, batch=4, runs=2).runs == 2


def test_other_processes_are_noticed(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.process_time
    monkeypatch.setattr(latency, "_busy_seconds", lambda cores: clock() + 0.9 * time.perf_counter())
    assert "0.9 of these cores" in str(benchmark(paths["narrow"], seconds=0.2).busy)
    monkeypatch.setattr(latency, "_busy_seconds", lambda cores: clock())
    assert benchmark(paths["narrow"], seconds=0.2).busy is None


def test_timings_are_json_and_print(paths: dict[str, Path]) -> None:
    timing = Timing("onnxruntime", 2, 1, 1.23456789, 2.0, 1.0, 1.5, 10, "busy")
    assert timing.to_json()["median_ms"] == 1.2346
    assert str(timing) == (
        "1.235 ms median, 2.000 ms p90 (10 runs, onnxruntime, 2 threads, batch 1); busy"
    )


def test_wrong_arguments_name_themselves(paths: dict[str, Path], tmp_path: Path) -> None:
    fixed = write_conv(tmp_path / "fixed.onnx", 4, batch=2)
    open_size = write_conv(tmp_path / "open.onnx", 4, size="any")
    with pytest.raises(InputError, match="more than the batch"):
        benchmark(open_size)
    with pytest.raises(InputError, match="batch of 2 only"):
        benchmark(fixed, batch=1)
    with pytest.raises(InputError, match="threads"):
        benchmark(fixed, threads=0)
    with pytest.raises(InputError, match="seconds"):
        benchmark(fixed, seconds=0)
    with pytest.raises(InputError, match="inputs"):
        benchmark(nn.Identity(), backend="torch")
    with pytest.raises(InputError, match="torch"):
        benchmark(nn.Identity())
    with pytest.raises(InputError, match="module"):
        benchmark(fixed, backend="torch")
    with pytest.raises(UnknownNameError):
        benchmark(fixed, backend="tensorrt")
    with pytest.raises(ArtifactError):
        benchmark(tmp_path / "absent.onnx")
