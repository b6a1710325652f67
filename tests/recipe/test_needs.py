"""A recipe finds its checkpoints, and says at once what is missing and where that comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from slimkit.errors import ArtifactError, DataError
from slimkit.models import build_model
from slimkit.recipe import load_recipe, parse_recipe, preview_run
from slimkit.recipe.cache import Cache
from slimkit.recipe.workbench import Workbench

VALUES = {
    "name": "found",
    "data": {"source": "digits", "image_size": 8, "limit": 64},
    "model": {
        "name": "slimkit:resnet20",
        "args": {"in_channels": 1, "width": 0.25},
        "checkpoint": "sub/weights.safetensors",
    },
    "variants": {"as_it_is": []},
}
PLACES = ("beside", "here", "root")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A recipe's folder, the current folder, and $SLIMKIT_CHECKPOINTS."""
    folders = {name: tmp_path / name for name in PLACES}
    for folder in folders.values():
        (folder / "sub").mkdir(parents=True)
    (folders["beside"] / "found.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    monkeypatch.chdir(folders["here"])
    monkeypatch.setenv("SLIMKIT_CHECKPOINTS", str(folders["root"]))
    return folders


def put(folder: Path, value: float) -> None:
    torch.manual_seed(0)
    network = build_model("slimkit:resnet20", in_channels=1, width=0.25)
    nn.init.constant_(network.fc.bias, value)
    save_file(network.state_dict(), str(folder / "sub" / "weights.safetensors"))


def loaded(folder: Path, cache: Path) -> float:
    bench = Workbench(load_recipe(folder / "found.yaml"), Cache(cache))
    return float(bench.result(()).fc.bias[0].detach())


@pytest.mark.parametrize("number", range(3))
def test_a_checkpoint_lies_beside_the_recipe_or_here_or_under_the_variable(
    number: int, places: dict[str, Path], tmp_path: Path
) -> None:
    for later in range(number, 3):  # the first place wins
        put(places[PLACES[later]], float(later))
    assert loaded(places["beside"], tmp_path / "cache") == float(number)


def test_the_key_is_that_of_the_contents_wherever_the_file_lies(
    places: dict[str, Path], tmp_path: Path
) -> None:
    keys = []
    for name in PLACES:
        put(places[name], 1.0)
        bench = Workbench(load_recipe(places["beside"] / "found.yaml"), Cache(tmp_path / "cache"))
        keys.append(bench.keys.chain(()))
        (places[name] / "sub" / "weights.safetensors").unlink()
    assert len(set(keys)) == 1


def test_a_resolved_recipe_has_no_paths_of_this_machine(places: dict[str, Path]) -> None:
    put(places["root"], 1.0)
    recipe = load_recipe(places["beside"] / "found.yaml")
    assert recipe.model.checkpoint == "sub/weights.safetensors"


def test_all_that_is_missing_is_told_before_anything_else(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMKIT_DATA", str(places["root"]))
    values = {
        **VALUES,
        "data": {"source": "parquet:nothing_here"},
        "teachers": {"big": {"name": "slimkit:resnet20", "checkpoint": "big.safetensors"}},
        "needs": {"nothing_here": "a data set that is made up", "big": "train it"},
        "takes": "three days",
    }
    with pytest.raises(DataError) as caught:
        preview_run(parse_recipe(values))
    message = str(caught.value)
    assert caught.value.where == "data.source"
    for part in (
        "there is no folder nothing_here",
        "model.checkpoint: sub/weights.safetensors: there is no such file",
        "teachers.big.checkpoint: big.safetensors",
        "nothing_here: a data set that is made up",
        "It takes three days.",
        "--smoke",
        "SLIMKIT_DATA",
    ):
        assert part in message


def test_nothing_is_read_before_it_is_told(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> None:
        pytest.fail("the data were read first")

    monkeypatch.setattr("slimkit.tasks.classification.load_data", slow)
    with pytest.raises(ArtifactError, match=r"no such file, nor .*root"):
        preview_run(load_recipe(places["beside"] / "found.yaml"))


def test_a_smoke_run_needs_none_of_it(places: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(places["beside"] / "found.yaml")
    bench = Workbench(recipe, Cache(tmp_path / "cache"), smoke=True)
    assert torch.isfinite(bench.result(()).fc.bias).all()
