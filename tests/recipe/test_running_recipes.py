"""Whole runs of a tiny recipe: what is written, what is cached, what gates do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import slimkit as sk
from slimkit.errors import ArtifactError, GateError
from slimkit.recipe import parse_recipe, preview_run, run_recipe


def test_a_run_leaves_what_the_contract_says(finished: Any) -> None:
    for name in ("report.json", "report.html", "recipe.yaml", "log.jsonl"):
        assert (finished.out / name).stat().st_size > 0
    report = json.loads((finished.out / "report.json").read_text())
    assert report == json.loads(json.dumps(finished.report))
    assert report["schema_version"] == 1
    assert report["seed"] == 0
    assert torch.__version__.startswith(report["environment"]["packages"]["torch"])
    assert [variant["name"] for variant in report["variants"]] == ["baseline", "final"]
    for variant in report["variants"]:
        assert 0 <= variant["metrics"]["accuracy"] <= 100
        cost = variant["cost"]
        assert set(cost) == {"params", "nonzero_params", "macs", "bops", "weight_bytes", "bytes"}
        (timing,) = variant["latency"]
        assert timing["backend"] == "onnxruntime"
        assert 0 < timing["median_ms"] <= timing["p90_ms"]
        assert variant["parity"]["top1_agreement"] >= 0.99
        for path in variant["files"].values():
            assert (finished.out / path).exists()
    for path in report["files"].values():
        assert (finished.out / path).exists()
    assert report["deploy"]["variant"] in {None, "baseline", "final"}
    resolved = parse_recipe(yaml.safe_load((finished.out / "recipe.yaml").read_text()))
    assert resolved.model_dump(mode="json") == report["recipe"]
    events = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "start"] == [
        "train",
        "prune",
        "recover",
        "int8",
    ]
    assert sum(e["event"] == "epoch" for e in events) == 7


def test_a_run_records_what_stands_behind_its_figures(finished: Any) -> None:
    report = finished.report
    first, last = report["variants"]
    for variant in (first, last):
        interval = variant["evidence"]["metrics"]["accuracy"]
        assert interval["of"] == report["data"]["test"] == variant["evidence"]["samples"]
        assert variant["metrics"]["accuracy"] == pytest.approx(
            100 * interval["right"] / interval["of"], abs=1e-3
        )
        timing = variant["latency"][0]
        assert timing["images_per_second"] == pytest.approx(1000 / timing["median_ms"], rel=0.01)
    change = last["evidence"]["change"]["accuracy"]
    right = [variant["evidence"]["metrics"]["accuracy"]["right"] for variant in (first, last)]
    assert change["won"] - change["lost"] == right[1] - right[0]
    kinds = [drawing["kind"] for drawing in report["drawings"]]
    assert kinds == ["table", "matrix", "gallery"]
    confusions = report["drawings"][1]["counts"]
    assert sum(row[n] for n, row in enumerate(confusions)) == right[1]


def test_the_pruned_and_quantized_variant_is_smaller_in_every_figure(finished: Any) -> None:
    first, last = finished.report["variants"]
    for name in ("params", "macs", "bops", "weight_bytes"):
        assert last["cost"][name] < 0.7 * first["cost"][name]
    size = (finished.out / last["files"]["onnx"]).stat().st_size
    assert last["cost"]["bytes"] == size
    assert last["fusion"]["integer_convs"] == last["fusion"]["convs"] == 2
    assert first["fusion"]["integer_convs"] == 0
    assert first["parity"]["max_abs_diff"] < 1e-4


def test_stages_carry_their_history_and_channels(finished: Any) -> None:
    train, prune, recover, int8 = finished.report["variants"][1]["stages"]
    assert [stage["type"] for stage in (train, prune, recover, int8)] == [
        "train",
        "prune",
        "train",
        "qat",
    ]
    assert [row["epoch"] for row in train["history"]] == [0, 1, 2]
    assert {"loss", "lr", "metrics"} <= train["history"][0].keys()
    kept = {row["layer"]: (row["kept"], row["total"]) for row in prune["channels"]}
    assert kept["conv1"] == (8, 16)
    assert kept["fc"] == (10, 10)
    assert recover["settings"]["distill"][0]["type"] == "kd"


def test_the_saved_model_and_the_exported_file_agree(finished: Any) -> None:
    from tiny_models import tiny

    from slimkit.runtime import open_session

    folder = finished.out / "variants" / "final"
    images = torch.randn(4, 1, 8, 8)
    loaded = sk.load(folder / "model", model=tiny()).eval()
    (exported,) = open_session(folder / "model.onnx").run([images.numpy()])
    with torch.no_grad():
        expected = loaded(images).numpy()
    np.testing.assert_allclose(exported, expected, atol=0.1 * np.abs(expected).max())


def test_predict_runs_alone_and_agrees_with_the_test_split(finished: Any, tmp_path: Path) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = finished.out / "variants" / "baseline"
    paths = []
    for index in range(3):
        pixels = (digits.images[index] * 255 / 16).astype(np.uint8)
        paths.append(str(tmp_path / f"digit{index}.png"))
        Image.fromarray(pixels).save(paths[-1])
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "predict.py"), *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(
        line.startswith(path) and "%" in line for line, path in zip(lines, paths, strict=True)
    )


def test_a_second_run_takes_everything_from_the_cache(
    finished: Any, tmp_path: Path, values: dict[str, Any], comparable: Callable[[Any], Any]
) -> None:
    events: list[str] = []
    again = run_recipe(
        parse_recipe(values),
        tmp_path / "again",
        cache=finished.cache,
        progress=False,
        listener=lambda event: events.append(event["event"]),
    )
    assert "start" not in events
    assert all(stage["cached"] for variant in again["variants"] for stage in variant["stages"])
    assert comparable(again) == comparable(finished.report)
    assert (
        again["variants"][0]["stages"][0]["seconds"]
        == (finished.report["variants"][0]["stages"][0]["seconds"])
    )


def test_a_missed_gate_is_an_error_after_everything_is_written(
    finished: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    values["variants"] = {"baseline": ["train"], "same": ["train"]}
    values["require"] = {"bytes_ratio": 0.5, "accuracy_drop": 0.0, "macs_ratio": 1.0}
    with pytest.raises(GateError, match=r"bytes_ratio is 1, required is at most 0\.5") as caught:
        run_recipe(parse_recipe(values), tmp_path, cache=finished.cache, progress=False)
    assert caught.value.exit_code == 1
    gates = json.loads((tmp_path / "report.json").read_text())["gates"]
    assert {gate["name"]: gate["passed"] for gate in gates} == {
        "accuracy_drop": True,
        "bytes_ratio": False,
        "macs_ratio": True,
    }
    assert (tmp_path / "report.html").exists()


def test_a_smoke_run_needs_no_data_and_leaves_the_cache_alone(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    values["data"] = {"source": "imagefolder:nowhere", "image_size": 8, "channels": 1}
    values["data"] |= {"batch_size": 512}
    values["stages"]["recover"]["teacher"] = "big"
    values["teachers"] = {
        "big": {"name": "tiny_models:tiny", "args": {"width": 32}, "checkpoint": "none.safetensors"}
    }
    values["stages"]["int8"] |= {"epochs": 1000, "batches": 100}
    values["variants"] = {"final": ["train", "prune", "recover", "int8"]}
    values["require"] = {"min_accuracy": 100}
    cache = tmp_path / "cache"
    report = run_recipe(
        parse_recipe(values), tmp_path / "out", smoke=True, cache=cache, progress=False
    )
    assert not cache.exists()
    assert report["smoke"] is True
    assert report["data"]["source"] == "synthetic"
    assert [s.get("steps") for s in report["variants"][0]["stages"]] == [2, None, 2, 2]


def test_a_dry_run_shows_sizes_and_what_is_cached_and_runs_nothing(
    finished: Any, values: dict[str, Any]
) -> None:
    values["stages"]["recover"]["epochs"] = 7
    preview = preview_run(parse_recipe(values), cache=finished.cache)
    rows = {(row.variant, row.stage): row for row in preview.rows}
    assert rows["baseline", "train"].cached
    assert rows["final", "train"].shared
    assert rows["final", "prune"].cached
    assert not rows["final", "recover"].cached
    assert (rows["final", "recover"].seconds or 0) > 0
    cost = finished.report["variants"][1]["cost"]
    assert rows["final", "prune"].macs == cost["macs"]
    assert rows["final", "(model)"].macs == finished.report["variants"][0]["cost"]["macs"]
    assert "recover" in json.dumps(preview.to_json())


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        run_recipe(parse_recipe(values), tmp_path / "file" / "out", cache=tmp_path / "cache")
    with pytest.raises(ArtifactError, match="SLIMKIT_CACHE"):
        run_recipe(parse_recipe(values), tmp_path / "out", cache=tmp_path / "file")


def test_what_a_killed_run_left_is_swept_and_files_of_ones_own_stay(tmp_path: Path) -> None:
    from slimkit.artifact import UNFINISHED
    from slimkit.recipe.runner import _sweep

    own = [
        tmp_path / name for name in (".recipe.yaml", ".recipe.original.yaml", ".report.mine.json")
    ]
    left = [tmp_path / f".{name}{UNFINISHED}abc12345.json" for name in ("report", "recipe")]
    for path in [*own, *left]:
        path.write_text("{}")
    _sweep(tmp_path)
    assert all(path.exists() for path in own)
    assert not any(path.exists() for path in left)
