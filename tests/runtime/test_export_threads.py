"""Exports beside other threads: torch says of the whole process that it exports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

import slimkit as sk
from slimkit.runtime.export_state import exporting, is_exporting


class Waiting(nn.Module):
    """Stops in the middle of being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.traced, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if is_exporting():
            self.traced.set()
            assert self.go_on.wait(60)
        return x


@contextmanager
def beside(export: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Another thread is in the middle of an export inside."""
    net = Waiting().eval()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(export, net)
        try:
            assert net.traced.wait(60)
            assert torch.compiler.is_exporting()
            yield
        finally:
            net.go_on.set()
            job.result()


@pytest.fixture
def net() -> nn.Module:
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return nn.Sequential(*layers).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 1, 8, 8)


def test_only_the_thread_that_exports_is_told_so(tmp_path: Path) -> None:
    assert not is_exporting()
    with beside(lambda net: sk.export(net, tmp_path / "a.onnx", torch.randn(2, 4))):
        assert not is_exporting()
    with beside(lambda net: torch.export.export(net, (torch.randn(2, 4),))):
        assert not is_exporting()
    assert not is_exporting()


def test_networks_run_and_are_quantized_the_same_beside_an_export(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    with torch.no_grad():
        quantized = sk.quantize.ptq(net, x, calibration=[x])
        expected, plain = quantized(x), net(x)
        with beside(lambda other: sk.export(other, tmp_path / "a.onnx", torch.randn(2, 4))):
            assert torch.equal(quantized(x), expected)
            assert torch.equal(net(x), plain)
            pool = ThreadPoolExecutor(1)
            job = pool.submit(lambda: sk.quantize.ptq(net, x, calibration=[x]))
            with pytest.raises(TimeoutError):  # its capture waits
                job.result(timeout=0.2)
        assert torch.equal(job.result(timeout=60)(x), expected)
        pool.shutdown()


def test_exports_of_one_network_in_threads_wait_for_each_other(
    net: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    net.train()
    with ThreadPoolExecutor(3) as pool:
        files = [tmp_path / f"{number}.onnx" for number in range(3)]
        list(pool.map(lambda file: sk.export(net, file, x), files))
    assert len({file.read_bytes() for file in files}) == 1
    assert all(module.training for module in net.modules())


def test_the_tracer_of_torch_is_itself_again() -> None:
    before = dict(vars(proxy_tensor._ModuleStackTracer))
    with exporting():
        assert dict(vars(proxy_tensor._ModuleStackTracer)) != before
    assert dict(vars(proxy_tensor._ModuleStackTracer)) == before
