from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkit.artifact import (
    atomic_directory,
    atomic_file,
    atomic_files,
    content_hash,
    read_json,
    read_tensors,
    tensors_hash,
    write_json,
    write_tensors,
    write_text,
)
from slimkit.errors import ArtifactError

Writer = Callable[[Path], AbstractContextManager[Path]]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_complete_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "text.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.suffix == target.suffix
    assert target.read_text() == "whole"
    assert _names(target.parent) == ["text.txt"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    target = tmp_path / "text.txt"
    write_text(target, "old")

    def half_way() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("ne")
            raise fault

    with pytest.raises(fault):
        half_way()
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["text.txt"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_full_disk_is_one_typed_error_and_leaves_what_was_there(
    tmp_path: Path, writer: Writer
) -> None:
    target = tmp_path / "thing"
    with atomic_directory(target) as folder:
        (folder / "old").touch()
    with pytest.raises(ArtifactError, match="No space left") as caught, writer(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.where == str(target)
    assert _names(tmp_path) == ["thing"]
    assert _names(target) == ["old"]


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, writer: Writer) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "inside"
    with pytest.raises(ArtifactError, match="inside"), writer(target):
        pytest.fail("must not get here")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / name).touch()
            assert _names(target) == ["one"] if target.exists() else True
    assert _names(target) == ["two"]
    assert _names(tmp_path) == ["model"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "ours", "text")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


@settings(max_examples=40)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
def test_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_hold_is_refused_and_writes_nothing(tmp_path: Path, value: object) -> None:
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        write_json(tmp_path / "x.json", value)
    assert _names(tmp_path) == []


def test_damaged_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b"')
    with pytest.raises(ArtifactError, match=r"x\.json.*line 2"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not a JSON file"):
        read_json(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        read_json(tmp_path / "missing.json")


def test_tensors_come_back_with_their_types(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {
        "view": shared.view(2, 3).t(),
        "shared": shared,
        "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_a_file_that_was_cut_off_is_damaged_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="not a complete safetensors file"):
        read_tensors(path)
    with pytest.raises(ArtifactError, match="no such file"):
        read_tensors(tmp_path / "missing.safetensors")


def test_content_hash_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": "1"})
    assert content_hash([1, 2]) != content_hash([2, 1])
    assert content_hash(json.loads("[1.0]")) != content_hash([1])


def test_tensor_hash_sees_names_types_shapes_and_bits() -> None:
    one = torch.arange(6, dtype=torch.float32)
    base = tensors_hash({"a": one, "b": one + 1})
    assert base == tensors_hash({"b": one + 1, "a": one.clone()})
    assert base == tensors_hash({"a": one.view(2, 3).t().t().reshape(6), "b": one + 1})
    for other in (one.view(2, 3), one.double(), one + 1e-6, -one):
        assert base != tensors_hash({"a": other, "b": one + 1})
    assert base != tensors_hash({"a": one + 1, "b": one})
    assert tensors_hash({"a": torch.tensor(1.0, dtype=torch.bfloat16)})


def test_a_file_never_lies_beside_companions_of_another_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_files(target, ["model.data"]) as folder:
        (folder / "model").write_text("old")
        (folder / "model.data").write_text("old data")
    assert (target.read_text(), (tmp_path / "model.data").read_text()) == ("old", "old data")
    with pytest.raises(ArtifactError), atomic_files(target / "below", ["model.data"]):
        pass
    assert (target.read_text(), (tmp_path / "model.data").read_text()) == ("old", "old data")
    with atomic_files(target, ["model.data"]) as folder:
        (folder / "model").write_text("alone")
    assert target.read_text() == "alone"
    assert _names(tmp_path) == ["model"]


def test_writing_never_changes_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the umask can be read without changing it on Linux only")
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
            write_text(tmp_path / "a", "a")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "Infinity", "[NaN]", "1e999", "9" * 5_000, str(2**63), "{", b"\xff"]
)
def test_json_beyond_the_limits_is_one_error_that_names_its_source(text: str | bytes) -> None:
    from slimkit.artifact import parse_json

    with pytest.raises(ArtifactError, match="peer: not a JSON file"):
        parse_json(text, "peer")
    assert parse_json(f"[{2**63 - 1}, {-(2**63)}, 1e308]", "peer") == [2**63 - 1, -(2**63), 1e308]
