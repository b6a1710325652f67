"""Run a recipe in processes that are killed at given points, again and again, until it is done.

Called as a program: ``killed_runs.py JOB.json``. One process imports the libraries and forks a
child per attempt, so that an attempt costs little. A point is ``KIND:STAGE[:NUMBER]``:

* ``start:train``, ``end:train``, ``epoch:train:0``, ``proof:baseline``: when the log says so;
* ``step:train:7``: in the stage's optimizer step number 7 of this attempt;
* ``storing:train``: while the finished stage is written into the cache;
* ``saving:``: while a variant's model is written into the output folder, all stages done;
* ``report:``: when everything is measured and ``report.json`` is about to be written.

The libraries keep threads of their own, which a fork does not copy: now and then a child is aborted
inside one of them before it comes to its point (SIGABRT, at another place each time). Such an
attempt is made again in a process of its own (``killed_runs.py JOB.json POINT``), which forks
nothing, and counted: a run of ours that aborts does so there too.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

import slimkit
import slimkit.plan
import slimkit.recipe.cache
import slimkit.recipe.runner
from slimkit.recipe import parse_recipe, run_recipe

PRELOADED = (
    "accelerate",
    "jinja2",
    "matplotlib.pyplot",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "rich.progress",
    "sklearn.datasets",
    "slimkit.distill",
    "slimkit.prune",
    "slimkit.quantize",
    "slimkit.report",
    "slimkit.train",
    "torch._dynamo",
    "torch.onnx._internal.exporter._core",
    "torch.utils.tensorboard",
)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class Killer:
    def __init__(self, point: str) -> None:
        kind, _, rest = point.partition(":")
        self.kind, (self.name, _, number) = kind, rest.partition(":")
        self.number = int(number or 0)
        self.stage = ""
        self.steps = 0
        if kind == "step":
            self._patch(torch.optim.SGD, "step", self.on_step)
        if kind == "storing":
            self._patch(slimkit.recipe.cache, "write_json", self.on_store)
        if kind == "saving":
            self._patch(slimkit.plan, "write_json", lambda: None if self.stage else die())
        if kind == "report":
            self._patch(slimkit.recipe.runner, "write_json", die)

    @staticmethod
    def _patch(owner: Any, name: str, before: Any) -> None:
        original = getattr(owner, name)

        def patched(*args: Any, **kwargs: Any) -> Any:
            before()
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    def on_step(self) -> None:
        if self.stage == self.name:
            if self.steps == self.number:
                die()
            self.steps += 1

    def on_store(self) -> None:
        if self.stage == self.name:
            die()

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            self.stage = event["stage"]
        subject = event.get("stage", event.get("variant", ""))
        number = event["epoch"] if self.kind == "epoch" == event["event"] else self.number
        if (event["event"], subject, number) == (self.kind, self.name, self.number):
            die()


def run(job: Mapping[str, Any], point: str) -> None:
    """Run the recipe in this process and be killed at the point; an empty one is never reached."""
    folder = Path(job["folder"])
    run_recipe(
        parse_recipe(job["recipe"]),
        folder / "killed",
        cache=folder / "killed-cache",
        progress=False,
        listener=Killer(point) if point else lambda event: None,
    )


def forked(job: Mapping[str, Any], point: str) -> int:
    """Run in a forked child; → the signal that ended it, 0 if it ran to the end."""
    child = os.fork()
    if child == 0:
        try:
            run(job, point)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(3)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def started(job_file: str, point: str) -> int:
    """Run in a process of its own; → as `forked`."""
    status = subprocess.run([sys.executable, __file__, job_file, point], check=False).returncode
    if status > 0:
        sys.exit(3)
    return -status


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    tqdm.monitor_interval = 0  # no thread of tqdm's
    for name in PRELOADED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as warm:
        slimkit.export(torch.nn.Linear(2, 2), f"{warm}/warm.onnx", torch.zeros(1, 2))
    ends: dict[str, int] = {}
    again = 0
    for point in [*job["points"], ""]:
        end = forked(job, point)
        if end == signal.SIGABRT:
            again += 1
            end = started(job_file, point)
        ends[point or "last"] = end
    sys.stdout.write(json.dumps({**ends, "again": again}) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        run(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    else:
        main(sys.argv[1])
