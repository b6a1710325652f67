"""``slimkit teach`` and ``knowledge:`` in recipes, with real processes that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slimkit.cli.main import main
from slimkit.distill.knowledge import issue_token
from slimkit.errors import DataError, RecipeError
from slimkit.recipe import load_recipe, parse_recipe, run_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.workbench import Workbench

ROOT = Path(__file__).resolve().parents[3]
NETWORK = (
    "import torch\nfrom torch import nn\n"
    "def build(num_classes=10, seed=5):\n    torch.manual_seed(seed)\n"
    "    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), "
    "nn.Linear(256, num_classes))\n"
)
RECIPE: dict[str, Any] = {
    "name": "small",
    "data": {
        "source": "digits", "image_size": 8, "batch_size": 16, "limit": 100,
        "augment": {"crop": 1},
    },
    "model": {"name": "knowledge_network:build"},
    "teachers": {"big": {"name": "knowledge_network:build", "args": {"seed": 1}}},
    "stages": {
        "train": {
            "type": "train", "epochs": 3, "lr": 0.05, "precision": "fp32",
            "distill": [{"type": "kd"}], "knowledge": ["file:knowledge"],
        }
    },
    "variants": {"baseline": [], "trained": ["train"]},
    "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the recipe with other knowledge, in a folder that has the network."""
    (tmp_path / "knowledge_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(tmp_path)]))

    def write(**changes: object) -> Path:
        values = json.loads(json.dumps(RECIPE))
        values["stages"]["train"] |= changes
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def serve_command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "slimkit.cli.main", "teach", "serve", str(recipe), *options]


def trained(recipe: Path, cache: Path) -> None:
    """Run the stage, without the measurements behind it."""
    store = Cache(cache)
    store.prepare()
    Workbench(load_recipe(recipe), store).record(("train",))


@contextmanager
def serving(recipe: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``slimkit teach serve`` in a process of its own, and its address."""
    command = serve_command(recipe, *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"grpc\S*$", line.strip())
            assert found, line
            yield process, found[0]
        finally:
            process.kill()


def weights(cache: Path) -> dict[str, torch.Tensor]:
    (path,) = cache.glob("stages/*/*/model/weights.safetensors")
    return load_file(path)


def test_a_recipe_learns_from_files_and_from_servers_alike(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["teach", "dump", str(recipe()), "--out", "knowledge", "--passes", "3"]) == 0
    path = recipe()
    trained(path, tmp_path / "files")
    with serving(path) as (process, address):
        path = recipe(knowledge=[address])
        trained(path, tmp_path / "online")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in {0, 130}
    files, online = weights(tmp_path / "files"), weights(tmp_path / "online")
    assert files.keys() == online.keys()
    for name, value in files.items():
        assert torch.equal(online[name], value)


def test_a_killed_teacher_and_a_killed_student_cost_nothing(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    (tmp_path / "secret").write_text("a secret of enough bytes\n")
    monkeypatch.setenv("SLIMKIT_TOKEN", issue_token(b"a secret of enough bytes", 600))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    monkeypatch.setenv("SLIMKIT_CACHE", str(killed))
    with serving(path, "--secret-file", "secret") as (_, address):
        path = recipe(knowledge=[address], epochs=80)
        student = subprocess.Popen(
            [sys.executable, "-m", "slimkit.cli.main", "run", str(path), "--quiet"]
        )
        deadline = time.monotonic() + 60
        while not list((killed / "work").glob("*/training.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        student.kill()
        student.wait()
    assert not list(killed.glob("stages/*/*"))
    # the teacher is dead too; the student waits for the next one at the same address
    port = address.rpartition(":")[2]
    command = [*serve_command(path, "--secret-file", "secret", "--port", port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as teacher:
        try:
            trained(path, killed)
            trained(path, whole)
        finally:
            teacher.kill()
    for name, value in weights(whole).items():
        assert torch.equal(weights(killed)[name], value)


def test_the_result_of_a_stage_can_teach(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(knowledge=[], distill=[])
    assert main(["teach", "dump", str(path), "--teacher", "train", "--out", "k"]) == 0
    index = json.loads((tmp_path / "k" / "index.json").read_text())
    assert index["complete"]
    assert index["description"]["teacher"].startswith("train ")


def test_teach_alone_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teach"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    for name in ("dump", "serve", "token"):
        assert name in captured.out


def test_a_smoke_run_needs_no_teacher(recipe: Callable[..., Path], tmp_path: Path) -> None:
    losses = [{"type": "kd"}, {"type": "mimic", "student": "0", "connector": "conv1x1"}]
    path = recipe(knowledge=["file:nowhere", "grpc://nowhere:1"], merge="sum", distill=losses)
    run_recipe(load_recipe(path), tmp_path / "smoke", smoke=True, progress=False)


def test_mistakes_are_found_before_training(recipe: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match=r"stages\.train\.knowledge.*no index\.json"):
        run_recipe(load_recipe(recipe()), out, progress=False)
    dump = ["teach", "dump", str(recipe()), "--out", "knowledge"]
    assert main([*dump, "--set", "data.limit=90"]) == 0
    with pytest.raises(DataError, match=r"stages\.train\.knowledge.*another data set"):
        run_recipe(load_recipe(recipe()), out, progress=False)
    assert not out.exists()
    assert main([*dump, "--top-k", "3"]) == 2  # other knowledge is in the folder
    assert main(["teach", "dump", str(recipe()), "--out", "k", "--dtype", "int4"]) == 2
    assert main(["teach", "dump", str(recipe()), "--out", "k", "--teacher", "bigg"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knowledge": ["fil:k"]}, r"stages\.train\.knowledge\.0: .*did you mean 'file'"),
        ({"knowledge": ["grpc:host"]}, r"stages\.train\.knowledge\.0: .*grpc://host:port"),
        ({"teacher": "big"}, r"stages\.train\.knowledge: there are a teacher and knowledge"),
        ({"distill": []}, r"stages\.train\.distill: there is knowledge but no loss"),
        ({"merge": "median"}, r"stages\.train\.merge"),
        ({"knowledge": []}, r"stages\.train\.teacher: there are losses but no teacher"),
    ],
)
def test_mistakes_in_the_recipe(changes: dict[str, object], message: str) -> None:
    values = json.loads(json.dumps(RECIPE))
    values["stages"]["train"] |= changes
    with pytest.raises(RecipeError, match=message):
        parse_recipe(values)


def test_other_knowledge_is_another_result(recipe: Callable[..., Path], tmp_path: Path) -> None:
    def key() -> str:
        return Workbench(load_recipe(recipe()), Cache(tmp_path / "cache")).keys.chain(("train",))

    dump = ["teach", "dump", str(recipe()), "--out", "knowledge"]
    assert main(dump) == 0
    first = key()
    assert key() == first
    shutil.rmtree(tmp_path / "knowledge")
    assert main([*dump, "--set", "teachers.big.args.seed=2"]) == 0
    assert key() != first
