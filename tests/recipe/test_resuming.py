"""A run that is killed with SIGKILL, anywhere, goes on and ends with the same report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slimkit

POINTS = [
    "start:train",
    "step:train:1",  # in the first epoch: nothing is saved yet
    "step:train:7",  # in the second
    "epoch:train:1",  # after an epoch, before its checkpoint
    "storing:train",
    "end:train",
    "start:prune",
    "end:prune",
    "start:recover",
    "step:recover:7",
    "end:recover",
    "step:int8:1",
    "step:int8:7",
    "end:int8",
    "saving:",
    "proof:baseline",
    "report:",
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_at_every_boundary_and_in_training_ends_with_the_same_report(
    tmp_path: Path,
    model_folder: Path,
    finished: Any,
    values: dict[str, Any],
    comparable: Callable[[Any], Any],
) -> None:
    job = {"recipe": values, "folder": str(tmp_path), "points": POINTS}
    (tmp_path / "job.json").write_text(json.dumps(job))
    source = Path(slimkit.__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("killed_runs.py")),
            str(tmp_path / "job.json"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(model_folder)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    again = ends.pop("again")  # attempts that a library aborted, see killed_runs.py
    assert ends == {**dict.fromkeys(POINTS, signal.SIGKILL), "last": 0}

    killed = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert comparable(killed) == comparable(json.loads(json.dumps(finished.report)))
    starts = _starts(tmp_path / "killed" / "log.jsonl")
    # begun anew after each kill in it, never after its end
    assert 6 <= starts.count("train") <= 6 + again
    assert 2 <= starts.count("prune") <= 2 + again
    for variant in ("baseline", "final"):
        calm_file, killed_file = (
            (folder / "variants" / variant / "model.onnx").read_bytes()
            for folder in (finished.out, tmp_path / "killed")
        )
        assert calm_file == killed_file
    leftovers = [p for name in ("killed", "killed-cache") for p in (tmp_path / name).rglob(".*")]
    assert leftovers == []
    assert not list((tmp_path / "killed-cache" / "work").iterdir())


def _starts(log: Path) -> list[str]:
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return [event["stage"] for event in events if event["event"] == "start"]
