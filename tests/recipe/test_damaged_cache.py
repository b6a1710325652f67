"""Entries of the cache that a power cut or a bad disk has changed: noticed, named, made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper
from torch import nn

from slimkit.errors import ArtifactError
from slimkit.recipe import parse_recipe, run_recipe
from slimkit.recipe.cache import Cache
from slimkit.runtime.onnx_files import write_onnx


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit, in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    write.__name__ = text[:8]
    return write


WRONG_SHAPES = [replace(text) for text in ("{}", "null", "[]", "3", '{"value": 1}', "[" * 100_000)]


def _relu() -> ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", *[[v] for v in values])
    return helper.make_model(graph)


def _stored(folder: Path) -> tuple[Cache, Path]:
    """A cache with one stage, one note and one exported file; and that file."""
    cache, net = Cache(folder / "cache"), nn.Linear(4, 4)
    cache.store("ab1", net, {"seconds": 1.0, "extra": {"by": {10: "a", 9: "b"}}})
    cache.store("ab2", {"small": net, "large": net}, {"seconds": 1.0, "extra": {}})
    cache.keep("proofs", "one", {"accuracy": 1.5, "sizes": (1, 2)})
    write_onnx(_relu(), folder / "model.onnx")
    cache.keep_file("exports", "one/model.onnx", folder / "model.onnx")
    return cache, folder / "model.onnx"


def test_what_was_kept_comes_back(tmp_path: Path) -> None:
    cache, file = _stored(tmp_path)
    told: list[str] = []
    record = cache.find("ab1", told.append)
    assert record == {"seconds": 1.0, "extra": {"by": {"10": "a", "9": "b"}}}
    cache.check_model("ab1")
    for part in ("small", "large"):
        cache.check_model("ab2", part)
    assert cache.note("proofs", "one", told.append) == {"accuracy": 1.5, "sizes": [1, 2]}
    assert cache.fetch_file("exports", "one/model.onnx", tmp_path / "copy.onnx", told.append)
    assert (tmp_path / "copy.onnx").read_bytes() == file.read_bytes()
    assert cache.find("ab9", told.append) is None
    assert cache.note("proofs", "two", told.append) is None
    assert not cache.fetch_file("exports", "two/model.onnx", tmp_path / "x.onnx", told.append)
    assert told == []


@pytest.mark.parametrize("harm", [empty, flip, *WRONG_SHAPES], ids=lambda harm: harm.__name__)
def test_json_that_is_not_what_was_written_does_not_exist(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    cache, _ = _stored(tmp_path)
    told: list[str] = []
    harm(cache.root / "proofs" / "one.json")
    assert cache.note("proofs", "one", told.append) is None
    harm(cache.root / "stages" / "ab" / "ab1" / "stage.json")
    assert cache.find("ab1", told.append) is None
    with pytest.raises(ArtifactError):
        cache.check_model("ab1")
    harm(cache.root / "exports" / "one" / "files.json")
    assert not cache.fetch_file("exports", "one/model.onnx", tmp_path / "x.onnx", told.append)
    assert [name in text for name, text in zip(("one.", "stage.", "files."), told, strict=True)]
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("harm", [empty, flip, Path.unlink], ids=["empty", "flip", "missing"])
def test_damaged_files_are_not_taken(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    cache, file = _stored(tmp_path)
    told: list[str] = []
    harm(cache.root / "exports" / "one" / "model.onnx")
    target = tmp_path / "variant" / "model.onnx"
    assert not cache.fetch_file("exports", "one/model.onnx", target, told.append)
    assert len(told) == 1
    assert "model.onnx" in told[0]
    assert not target.exists()
    cache.keep_file("exports", "one/model.onnx", file)  # made again
    assert cache.fetch_file("exports", "one/model.onnx", target, told.append)
    assert len(told) == 1

    harm(cache.model_folder("ab2", "small") / "weights.safetensors")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors"):
        cache.check_model("ab2", "small")
    cache.check_model("ab2", "large")


def test_a_run_names_damage_once_and_makes_it_again(values: dict[str, Any], tmp_path: Path) -> None:
    values["variants"] = {"final": ["train"]}
    values["stages"]["train"]["epochs"] = 1

    def run() -> tuple[dict[str, Any], list[str]]:
        told: list[Any] = []
        report = run_recipe(
            parse_recipe(values),
            tmp_path / "out",
            cache=tmp_path / "cache",
            progress=False,
            listener=told.append,
        )
        return report, [
            event.get("stage") or event["kind"] for event in told if event["event"] == "damaged"
        ]

    def found(pattern: str) -> Path:
        [path] = (tmp_path / "cache").glob(pattern)
        return path

    def metrics(report: dict[str, Any]) -> Any:
        return report["variants"][0]["metrics"]

    first, damaged = run()
    assert damaged == []
    exported = (tmp_path / "out" / "variants" / "final" / "model.onnx").read_bytes()
    flip(found("exports/*/model.onnx"))
    empty(found("proofs/*.json"))
    (evidence,) = (tmp_path / "cache" / "evidence").glob("*.json")
    evidence.write_text("{}")
    again, damaged = run()
    assert damaged == ["exports", "proofs", "evidence"]
    assert metrics(again) == metrics(first)
    flip(found("stages/*/*/model/weights.safetensors"))
    shutil.rmtree(found("exports/*"))
    last, damaged = run()
    assert damaged == ["train"]
    assert metrics(last) == metrics(first)
    assert len(exported) == (tmp_path / "out/variants/final/model.onnx").stat().st_size
    _, damaged = run()
    assert damaged == []
    assert isinstance(json.loads(found("proofs/*.json").read_text())["value"], dict)
