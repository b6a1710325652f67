"""What a result depends on is in its key, what it does not depend on is not."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimkit.errors import ArtifactError
from slimkit.recipe import parse_recipe
from slimkit.recipe.cache import Cache
from slimkit.recipe.chains import resolve_steps
from slimkit.recipe.keys import Keys
from slimkit.recipe.workbench import Workbench
from slimkit.runtime import export, onnx_files, parity

CHAIN = ("train", "prune", "recover", "int8")


def _keys(values: dict[str, Any], overrides: list[str], fingerprint: str = "data") -> list[str]:
    recipe = parse_recipe(values, overrides)
    keys = Keys(recipe, resolve_steps(recipe), fingerprint)
    chain = recipe.variants["final"]
    return [keys.chain(chain[: end + 1]) for end in range(len(chain))]


CHANGES = [
    ("name=other", CHAIN),
    ("stages.train.log_every=1", CHAIN),
    ("stages.train.momentum=0.9", CHAIN),  # its default
    ("measure.seconds=9", CHAIN),
    ("require.accuracy_drop=1", CHAIN),
    ("variants.first=[train, int8]", CHAIN),
    ("stages.int8.batches=2", CHAIN[:3]),
    ("stages.recover.distill.0.temperature=2", CHAIN[:2]),
    ("stages.prune.ratio=0.4", CHAIN[:1]),
    ("data.eval_batch_size=64", CHAIN[:1]),  # calibration batches; training does not see them
    ("stages.train.lr=0.2", ()),
    ("seed=1", ()),
    ("model.args={width: 8}", ()),
]


@pytest.mark.parametrize(("override", "kept"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_change_gives_new_keys_from_where_it_matters_on(
    values: dict[str, Any], override: str, kept: tuple[str, ...]
) -> None:
    before, after = _keys(values, []), _keys(values, [override])
    same = [a == b for a, b in zip(before, after, strict=True)]
    assert same == [True] * len(kept) + [False] * (len(CHAIN) - len(kept))


def test_data_and_torch_are_part_of_every_key_and_names_of_stages_are_not(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _keys(values, [])
    assert not set(before) & set(_keys(values, [], "other data"))
    renamed = {f"my_{name}": dict(stage) for name, stage in values["stages"].items()}
    for name in ("my_recover", "my_int8"):
        renamed[name]["teacher"] = "my_train"
    chains = {name: [f"my_{s}" for s in chain] for name, chain in values["variants"].items()}
    assert _keys({**values, "stages": renamed, "variants": chains}, []) == before
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert not set(before) & set(_keys(values, []))


def test_the_teachers_result_is_part_of_the_key(values: dict[str, Any], tmp_path: Path) -> None:
    values["variants"]["teacher"] = ["big"]
    values["stages"]["big"] = {"type": "train", "epochs": 9, "lr": 0.1}
    values["stages"]["recover"]["teacher"] = "big"
    before = _keys(values, [])
    after = _keys(values, ["stages.big.epochs=8"])
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]


def _started(values: dict[str, Any], cache: Path) -> list[str]:
    """Run the final chain and return the stages that were not taken from the cache."""
    started: list[str] = []

    def listen(event: Any) -> None:
        if event["event"] in {"start", "damaged", "waiting"}:
            started.append(f"{event['event']} {event['stage']}")

    bench = Workbench(parse_recipe(values), Cache(cache), emit=listen)
    bench.result(bench.recipe.variants["final"])
    return started


def test_only_what_changed_runs_and_a_damaged_entry_runs_again(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["variants"] = {"final": ["train", "prune"]}
    assert _started(values, tmp_path) == ["start train", "start prune"]
    assert _started(values, tmp_path) == []
    values["stages"]["prune"]["criterion"] = "l1"
    assert _started(values, tmp_path) == ["start prune"]

    cache = Cache(tmp_path)
    recipe = parse_recipe(values)
    bench = Workbench(recipe, cache)
    weights = cache.model_folder(bench.keys.chain(("train", "prune"))) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert _started(values, tmp_path) == ["damaged prune", "start prune"]
    assert _started(values, tmp_path) == []


def test_a_full_disk_is_an_error_and_leaves_no_entry(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["variants"] = {"final": ["train"]}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("slimkit.recipe.cache.save", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            _started(values, tmp_path)
    assert not list((tmp_path / "stages").glob("*/*"))
    assert _started(values, tmp_path) == ["start train"]


def test_a_second_process_waits_for_the_first_and_takes_its_result(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["variants"] = {"final": ["train"]}
    key = Workbench(parse_recipe(values), Cache(tmp_path)).keys.chain(("train",))
    seen: list[list[str]] = []
    other = threading.Thread(target=lambda: seen.append(_started(values, tmp_path)))
    with Cache(tmp_path).lock(key):
        other.start()
        time.sleep(0.3)
        assert not seen
    other.join(60)
    assert seen == [["waiting train", "start train"]]


def test_a_stage_that_returns_something_else_is_told_so(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slimkit.errors import SlimkitError
    from slimkit.recipe.stages.training import TrainStage

    run: Callable[..., Any] = lambda stage, model, context: model  # noqa: E731
    monkeypatch.setattr(TrainStage, "run", run)
    values["variants"] = {"final": ["train"]}
    with pytest.raises(SlimkitError, match=r"stages\.train: run\(\) returned Tiny"):
        _started(values, tmp_path)


def test_weights_beside_an_exported_file_are_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "PROTOBUF_LIMIT", 2_000)
    cache, x = Cache(tmp_path / "cache"), torch.randn(1, 64)
    nets = [nn.Linear(64, 64) for _ in range(2)]
    for number, net in enumerate(nets):
        export(net, tmp_path / f"{number}" / "model.onnx", x)
        cache.keep_file("exports", f"{number}/model.onnx", tmp_path / f"{number}" / "model.onnx")
    for number, net in enumerate(nets):
        target = tmp_path / "variant" / "model.onnx"
        assert cache.fetch_file("exports", f"{number}/model.onnx", target)
        assert parity(net, target, [x]).max_abs_diff < 1e-5
    assert not cache.fetch_file("exports", "2/model.onnx", target)
