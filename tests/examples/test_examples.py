"""The examples run: in one process, with few steps, each with its own training loop."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

NEEDS = {"huggingface_trainer": "transformers", "lightning_module": "lightning"}
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of that name, with its neighbours importable as when it is run as a script."""
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param], reason="pip install 'slimkit[examples]'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def smaller(rows: list[dict[str, float]], out: Path) -> bool:
    """Whether both files are there, and the compressed one is at most 20 % of the other."""
    before, after = rows
    assert (out / "compressed.onnx").stat().st_size == round(1000 * after["kilobytes"])
    assert after["milliseconds"] > 0
    return after["kilobytes"] < 0.2 * before["kilobytes"]


@pytest.mark.parametrize("example", ["plain_pytorch"], indirect=True)
def test_a_plain_loop(example: ModuleType, tmp_path: Path) -> None:
    rows = example.main(["--steps", "40", "--out", str(tmp_path)])
    assert smaller(rows, tmp_path)
    assert rows[1]["accuracy"] > max(80, rows[0]["accuracy"] - 10)
    assert (tmp_path / "model" / "weights.safetensors").exists()


@pytest.mark.parametrize("example", ["teachers_anywhere"], indirect=True)
def test_teachers_in_processes_and_files(example: ModuleType, tmp_path: Path) -> None:
    accuracy = example.main(["--epochs", "2", "--out", str(tmp_path)])
    assert (tmp_path / "knowledge" / "index.json").exists()
    assert min(accuracy.values()) > 30


@pytest.mark.parametrize("example", ["teachers_anywhere"], indirect=True)
def test_teachers_on_a_ray_cluster(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="pip install 'slimkit[distributed]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # actors import the example
    accuracy = example.main(["--epochs", "2", "--out", str(tmp_path), "--ray"])
    assert min(accuracy.values()) > 30


@pytest.mark.parametrize("example", ["huggingface_trainer"], indirect=True)
def test_a_hugging_face_trainer(example: ModuleType, tmp_path: Path) -> None:
    assert smaller(example.main(["--steps", "8", "--out", str(tmp_path)]), tmp_path)


@pytest.mark.parametrize("example", ["lightning_module"], indirect=True)
def test_a_lightning_module(example: ModuleType, tmp_path: Path) -> None:
    assert smaller(example.main(["--steps", "8", "--out", str(tmp_path)]), tmp_path)
