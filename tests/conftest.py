"""What all tests share: few threads, a fixed seed, a private cache, and the devices."""

from __future__ import annotations

import os
import signal

# Before torch is imported: many small networks run faster side by side than wide.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from pathlib import Path

# Ctrl-C is ignored in a shell's background job, and would be by all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("slimkit", deadline=None)  # the machine may be busy
settings.load_profile("slimkit")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that a test must pass on; CUDA is skipped where there is none."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Keep the user's own stage cache out of tests, and tests out of it."""
    folder = tmp_path_factory.getbasetemp() / "slimkit-cache"
    monkeypatch.setenv("SLIMKIT_CACHE", str(folder))
    return folder
