"""Two processes with half a batch each train as one with whole batches."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("shared_runs.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="gloo over loopback is tried on POSIX")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / "sums.json")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    expected = runpy.run_path(str(SCRIPT))["all_runs"]()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    found = json.loads((tmp_path / "sums.json").read_text(encoding="utf-8"))
    assert found.keys() == expected.keys()
    assert len(found) == 4
    for name, sums in expected.items():
        assert found[name] == pytest.approx(sums, rel=1e-4, abs=1e-5), name
