"""Checkpoints load completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from slimkit.artifact import write_tensors
from slimkit.errors import ArtifactError, CheckpointError
from slimkit.models import load_checkpoint


def network(classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def test_weights_come_back_equal(tmp_path: Path) -> None:
    source, target = network(), network()
    write_tensors(tmp_path / "w.safetensors", source.state_dict())
    load_checkpoint(target, tmp_path / "w.safetensors")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


def test_prefix_of_data_parallel_is_accepted(tmp_path: Path) -> None:
    source, target = network(), network()
    prefixed = {f"module.{name}": value for name, value in source.state_dict().items()}
    write_tensors(tmp_path / "w.safetensors", prefixed)
    load_checkpoint(target, tmp_path / "w.safetensors")
    assert torch.equal(target[0].weight, source[0].weight)


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {n: t for n, t in network().state_dict().items() if "num_batches" not in n}
    write_tensors(tmp_path / "w.safetensors", state)
    load_checkpoint(network(), tmp_path / "w.safetensors")


def test_another_number_of_classes_is_named_and_changes_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", network(classes=5).state_dict())
    target = network()
    before = target[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"3\.weight is \(5, 4\).*\(3, 4\).*classes"):
        load_checkpoint(target, tmp_path / "w.safetensors")
    assert torch.equal(target[0].weight, before)


def test_missing_and_unexpected_names_are_named(tmp_path: Path) -> None:
    state = network().state_dict()
    state["3.wieght"] = state.pop("3.weight")
    write_tensors(tmp_path / "w.safetensors", state)
    with pytest.raises(CheckpointError, match=r"3\.weight is not in the file.*3\.wieght"):
        load_checkpoint(network(), tmp_path / "w.safetensors")


def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "w.pth")  # a whole module: making it again would run code
    with pytest.raises(CheckpointError, match="only running code could make") as caught:
        load_checkpoint(network(), tmp_path / "w.pth")
    assert "state_dict()" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"anything", b"PK\x03\x04anything"])
def test_a_damaged_pickle_is_an_artifact_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"complete file of torch\.save"):
        load_checkpoint(network(), tmp_path / "w.pth")


def test_cut_off_file_is_an_artifact_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", network().state_dict())
    content = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="complete safetensors"):
        load_checkpoint(network(), tmp_path / "w.safetensors")
