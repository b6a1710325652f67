"""Commands for any model or file: export, evaluate, profile, benchmark, quantize, and the cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import slimkit as sk
from slimkit.cli.main import main
from slimkit.errors import ArtifactError, CheckpointError
from slimkit.models import build_model, load_checkpoint

Cli = Callable[..., tuple[int, str, str]]

MODULE = """\
import torch
from torch import nn


def build(num_classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes)
    )


def splits():
    generator = torch.Generator().manual_seed(0)
    def samples(count):
        images = torch.rand(count, 1, 8, 8, generator=generator)
        return [(image, number % 10) for number, image in enumerate(images)]
    return {"train": samples(40), "test": samples(20)}


def no_splits():
    return [1, 2]


def bad_label():
    return {"train": [(torch.zeros(1, 8, 8), 1.5)], "test": [(torch.zeros(1, 8, 8), 0)]}


def failing():
    raise RuntimeError("disk on fire")
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, with a module of the user's own."""
    import sys

    (tmp_path / "own_things.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SLIMKIT_DATA", str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_things", None)


@pytest.fixture
def weights(here: Path) -> Path:
    path = here / "weights.pth"
    torch.save({"epoch": 3, "state_dict": build_model("own_things:build").state_dict()}, path)
    return path


def test_a_model_is_exported_with_its_checkpoint_and_evaluated_as_model_and_as_file(
    cli: Cli, here: Path, weights: Path
) -> None:
    shape = ("--input", "1,1,8,8")
    code, out, err = cli(
        "export", "own_things:build", "--checkpoint", weights, *shape, "--out", here / "m.onnx"
    )
    assert code == 0, err
    assert "against PyTorch" in out
    assert "random" not in err
    source = ("--data", "digits", "--split", "test")
    network = cli("evaluate", "own_things:build", "--checkpoint", weights, *source)
    file = cli("evaluate", here / "m.onnx", *source)
    assert network[0] == file[0] == 0, (network, file)
    assert network[1].splitlines()[0].startswith("accuracy ")
    assert network[1].splitlines()[0] == file[1].splitlines()[0]
    code, _, err = cli("export", "own_things:build", *shape, "--out", here / "r.onnx")
    assert "its weights are random" in err


def test_a_saved_folder_is_a_checkpoint_plans_and_all(cli: Cli, here: Path) -> None:
    network = build_model("own_things:build").eval()
    x = torch.zeros(1, 1, 8, 8)
    sk.apply(network, sk.prune.plan(network, x, ratio=0.5, round_to=1))
    sk.save(network, here / "pruned")
    out = here / "p.onnx"
    code, _, err = cli(
        "export", "own_things:build", "--checkpoint", here / "pruned", "--image-size", 8,
        "--arg", "num_classes=10", "--out", out, "--input", "1,1,8,8",
    )  # fmt: skip
    assert code == 2
    assert "--image-size: --input says it already" in err
    code, _, err = cli(
        "export", "own_things:build", "--checkpoint", here / "pruned", "--input", "1,1,8,8",
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    loaded = sk.load(here / "pruned", build_model("own_things:build").eval())
    assert torch.equal(loaded(x), network(x))
    code, printed, _ = cli("profile", out, "--json")
    assert json.loads(printed)["macs"] == sk.profile(network, x).macs


def test_a_file_is_profiled_like_its_network_and_benchmarked_beside_a_model(
    cli: Cli, here: Path
) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(), nn.Linear(144, 5),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    sk.export(network, here / "net.onnx", x)
    code, printed, err = cli("profile", here / "net.onnx", "--json")
    assert code == 0, err
    found, expected = json.loads(printed), sk.profile(network, x)
    assert (found["macs"], found["params"]) == (expected.macs, expected.params)
    quantized = sk.quantize.ptq(network, x, calibration=[x])
    sk.export(quantized, here / "int8.onnx", x)
    int8 = json.loads(cli("profile", here / "int8.onnx", "--json")[1])
    assert int8["macs"] == expected.macs
    assert int8["bops"] < expected.bops
    assert int8["bytes"] == (here / "int8.onnx").stat().st_size
    code, printed, err = cli(
        "benchmark", here / "net.onnx", "own_things:build", "--input", "1,1,8,8", "--seconds", 0.02,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert set(json.loads(printed)) == {str(here / "net.onnx"), "own_things:build"}


def test_an_open_dimension_of_a_file_is_asked_for(cli: Cli, here: Path) -> None:
    network = nn.Conv2d(3, 4, 3)
    dynamic = {"x": {2: "height", 3: "width"}}
    sk.export(
        network,
        here / "open.onnx",
        torch.zeros(1, 3, 16, 16),
        input_names=["x"],
        dynamic_axes=dynamic,
    )
    code, _, err = cli("profile", here / "open.onnx")
    assert code == 2
    assert "--size height=224" in err
    code, printed, _ = cli(
        "profile", here / "open.onnx", "--size", "height=16", "--size", "width=16", "--json"
    )
    assert json.loads(printed)["macs"] == 14 * 14 * 4 * 27


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module"])
def test_state_dicts_of_torch_save_are_read_whatever_they_are_wrapped_in(
    tmp_path: Path, wrap: str | None
) -> None:
    network = nn.Linear(3, 2)
    held: dict[str, object] = dict(network.state_dict())
    if wrap == "module":
        held = {"model": {f"module.{name}": value for name, value in held.items()}}
    elif wrap:
        held = {"epoch": 1, "optimizer": {"lr": 0.1}, wrap: held}
    torch.save(held, tmp_path / "w.pt")
    again = load_checkpoint(nn.Linear(3, 2), tmp_path / "w.pt")
    assert torch.equal(again.weight, network.weight)


def test_checkpoints_that_hold_code_or_something_else_are_refused(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    torch.save(network, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="more than tensors"):
        load_checkpoint(network, tmp_path / "module.pt")
    torch.save({"weight": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_checkpoint(network, tmp_path / "list.pt")
    torch.save([1], tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_checkpoint(network, tmp_path / "other.pt")
    torch.save({"wieght": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "names.pt")
    with pytest.raises(CheckpointError, match="wieght"):
        load_checkpoint(network, tmp_path / "names.pt")
    content = (tmp_path / "list.pt").read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises((ArtifactError, CheckpointError)):
            load_checkpoint(network, tmp_path / "cut.pt")


def test_a_data_set_of_ones_own_is_evaluated_and_its_mistakes_are_named(
    cli: Cli, here: Path, weights: Path
) -> None:
    model = ("evaluate", "own_things:build", "--checkpoint", weights, "--split", "test", "--data")
    code, out, err = cli(*model, "own_things:splits")
    assert code == 0, err
    assert out.startswith("accuracy ")
    for name, told in (
        ("no_splits", "returned list, not its splits"),
        ("bad_label", "train[0]: expected a class number"),
        ("failing", "RuntimeError: disk on fire"),
        ("nothing", "no attribute 'nothing'"),
    ):
        code, _, err = cli(*model, f"own_things:{name}")
        assert code == 2
        assert told in err.replace("own_things:bad_label train", "train")
        assert len(err.splitlines()) == 1


def test_images_without_labels_calibrate_and_are_not_judged(
    cli: Cli, here: Path, weights: Path
) -> None:
    folder = here / "pictures" / "inner"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{number}.png")
    where = ("own_things:build", "--checkpoint", weights, "--data", "images:pictures")
    config = here / "grey.py"
    config.write_text("")
    code, _, err = cli("quantize", *where, "--out", here / "q.onnx", "--batches", 1)
    assert code == 2  # the network takes grey images, the folder gives colours
    assert "cannot take inputs of shape (2, 3, 8, 8)" in err
    (here / "colour.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), "
        "nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))\n"
    )
    code, _, err = cli(
        "quantize", "colour:build", "--data", "images:pictures", "--out", here / "q.onnx",
        "--batches", 1,
    )  # fmt: skip
    assert code == 0, err
    assert onnx.load(str(here / "q.onnx"))
    code, _, err = cli("evaluate", "colour:build", "--data", "images:pictures", "--split", "test")
    assert code == 2
    assert "no labels" in err


def test_the_cache_is_listed_and_cleared(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    monkeypatch.setenv("SLIMKIT_CACHE", str(here / "cache"))

    recipe = {
        "name": "small",
        "data": {"source": "own_things:splits", "batch_size": 8, "validation": 10},
        "model": {"name": "own_things:build"},
        "stages": {"train": {"type": "train", "epochs": 1, "lr": 0.05, "precision": "fp32"}},
        "variants": {"trained": ["train"]},
        "measure": {"seconds": 0.02, "parity_batches": 1, "memory": False},
    }
    (here / "small.yaml").write_text(yaml.safe_dump(recipe))
    cache = here / "cache"
    code, _, err = cli("run", "small.yaml", "--out", "out")
    assert code == 0, err
    code, out, _ = cli("cache", "list")
    assert code == 0
    assert "stages" in out
    assert "exports" in out
    old = time.time() - 40 * 86_400
    stage = next((cache / "stages").glob("??/*"))
    for path in [*stage.rglob("*"), stage]:
        os.utime(path, (old, old))
    code, out, _ = cli("cache", "clear", "--older-than", 30, "--yes")
    assert "removed 1 of 1 entries" in out
    assert not stage.exists()
    code, out, _ = cli("cache", "clear", "--yes")
    assert code == 0
    assert not list(cache.glob("exports/*/*"))
    assert "nothing to remove" in cli("cache", "clear", "--yes")[1]
    assert "0 entries" in cli("cache", "list", "--cache", here / "nowhere")[1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("export", "slimkit:resnet20", "--out", "folder"), "expected a file NAME.onnx"),
        (("export", "slimkit:resnet2", "--out", "m.onnx"), "resnet20"),
        (("export", "slimkit:resnet20", "--checkpoint", "no.pt", "--out", "m.onnx"), "no.pt"),
        (("evaluate", "nowhere.onnx", "--data", "digits"), "nowhere.onnx"),
        (("evaluate", "slimkit:resnet20", "--data", "digit"), "'digits'"),
        (("evaluate", "slimkit:resnet20", "--data", "imagefolder:none"), "there is no folder"),
        (("profile", "nowhere.onnx"), "nowhere.onnx"),
        (("compare", "one"), "two reports or more"),
    ],
)
def test_bad_input_is_one_line(cli: Cli, here: Path, arguments: tuple[str, ...], told: str) -> None:
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1
    assert not list(here.glob("*.onnx"))
