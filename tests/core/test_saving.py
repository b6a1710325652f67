"""Saved folders: killed at every step, several writers, readers beside them, damaged files."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import slimkit as sk
from slimkit import artifact
from slimkit.artifact import atomic_directory, read_directory
from slimkit.errors import ArtifactError, SlimkitError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def _filled(value: float) -> nn.Linear:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(value)
        layer.bias.fill_(value)
    return layer


def _value(folder: Path) -> float:
    """Of the one version that is there, whole."""
    net = sk.load(folder, model=nn.Linear(4, 4))
    values = set(net.weight.detach().flatten().tolist()) | set(net.bias.detach().tolist())
    assert len(values) == 1
    return values.pop()


def _no_exchange(*_: object) -> bool:
    return False


@pytest.fixture(params=["in one step", "in two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How folders change places: as the file system can, or as the poorest one does."""
    if request.param == "in two steps":
        monkeypatch.setattr(artifact, "_exchanged", _no_exchange)
    return str(request.param)


_STEPS = {"replace", "rename", "_exchanged", "_sync", "mkdtemp", "rmtree", "chmod", "write_text"}


def _killed_after(step: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a forked process that is killed before or after its n-th step on the disk.

    Returns:
        Whether it was killed; otherwise it had fewer steps.
    """
    process = os.fork()
    if process == 0:
        left = [step]

        def count(_frame: object, event: str, what: object) -> None:
            name = getattr(what, "__name__", "") if event.startswith("c_") else ""
            name = name or getattr(getattr(_frame, "f_code", None), "co_name", "")
            if name in _STEPS and event != "c_exception":
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


@needs_fork
def test_a_save_killed_at_any_step_leaves_the_old_or_the_new_version(
    tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "model"
    sk.save(_filled(0), folder)
    seen, current, steps = set(), 0.0, 0
    while _killed_after(steps, partial(sk.save, _filled(steps + 1), folder)):
        found = _value(folder)
        assert found in {current, steps + 1}
        seen.add(found == current)
        current, steps = found, steps + 1
    assert steps > 20, way
    assert seen == {True, False}
    assert _value(folder) == steps + 1


def _write(folder: Path, number: int, times: int) -> None:
    for turn in range(times):
        sk.save(_filled(100 * number + turn), folder)


@needs_fork
def test_writers_at_once_end_with_one_of_them_whole_and_readers_see_one(
    tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "model"
    sk.save(_filled(0), folder)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(folder, n, 10)) for n in range(1, 5)]
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers):
        _value(folder)
        read += 1
    assert [writer.exitcode for writer in writers] == [0] * 4, way
    assert read > 0
    assert _value(folder) in {100 * n + 9 for n in range(1, 5)}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_an_older_version_lost_is_found_again(tmp_path: Path) -> None:
    sk.save(_filled(3), tmp_path / "model")
    outgoing = tmp_path / ".model.old.abc"
    outgoing.mkdir()
    (tmp_path / "model").rename(outgoing / "model")
    assert _value(tmp_path / "model") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reader_begins_anew_when_the_folder_is_replaced_meanwhile(tmp_path: Path) -> None:
    folder, turns = tmp_path / "pair", iter(range(3))

    def write(text: str) -> None:
        with atomic_directory(folder) as temporary:
            for name in ("one", "two"):
                (temporary / name).write_text(text)

    def read(place: Path) -> tuple[str, str]:
        one = (place / "one").read_text()
        with contextlib.suppress(StopIteration):
            write(f"version {next(turns)}")
        return one, (place / "two").read_text()

    write("first")
    assert read_directory(folder, read) == ("version 2", "version 2")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    sk.save(_filled(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert _value(tmp_path / "real") == 1


@pytest.mark.parametrize("place", [".", "..", "file"])
def test_what_must_not_be_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("mine")
    monkeypatch.chdir(home)
    with pytest.raises(ArtifactError, match=r"current folder|no folder"):
        sk.save(_filled(1), place)
    assert (home / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "file"]


def test_a_disk_that_fails_to_sync_leaves_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sk.save(_filled(1), tmp_path / "model")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ArtifactError, match="Input/output"):
            sk.save(_filled(2), tmp_path / "model")
    assert _value(tmp_path / "model") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    sk.apply(net, sk.prune.plan(net, torch.zeros(2, 4), ratio=0.5))
    return sk.save(net, tmp_path / "model")


def _fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "null", "3", '"plans"', '{"plans": 3}', '{"plans": [3]}', '{"plans": [null]}'),
        *("[" * 10**5, '{"plans": ' * 500 + "1" + "}" * 500, '{"plans": [' + "9" * 5000 + "]}"),
        *('{"plans": ["a\\u0000"]}', '{"plans": ["../outside.json"]}', '{"plans": [".."]}'),
        *('{"plans": ["/etc/passwd"]}', '{"plans": ["sub/x.json"]}', '{"plans": ["missing.json"]}'),
        *('{"plans": [], "format": "1"}', '{"plans": [], "format": 99}'),
        *('{"plans": [], "metadata": []}', '{"plans": [], "metadata": {"": 3}}'),
        *('{"plans": [], "extra_state": 1}', '{"plans": [], "files": {"../x": ""}}'),
        *('{"plans": [], "files": []}', '{"plans": [], "sha256": []}'),
    ],
)
def test_an_index_of_the_wrong_shape_is_typed_and_nothing_outside_is_read(
    saved: Path, text: str
) -> None:
    outside = {"format": 1, "kind": "fuse", "version": 1, "plan": {"pairs": []}}
    for place in (saved.parent / "outside.json", saved / "sub" / "x.json"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(outside))
    (saved / "plans.json").write_text(text)
    with pytest.raises(SlimkitError):
        sk.load(saved, model=_fresh())


@pytest.mark.parametrize("name", ["plans.json", "plan0_prune.json", "weights.safetensors"])
def test_no_changed_byte_is_accepted_with_another_result(saved: Path, name: str) -> None:
    x = torch.randn(3, 4)
    expected = sk.load(saved, model=_fresh())(x)
    whole = (saved / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        (saved / name).write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        try:
            found = sk.load(saved, model=_fresh())(x)
        except SlimkitError:
            continue
        assert torch.equal(found, expected)
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlimkitError):
        sk.load(saved, model=_fresh())


def test_a_folder_of_an_older_version_has_no_checksums_and_still_loads(saved: Path) -> None:
    expected = sk.load(saved, model=_fresh()).state_dict()
    index = json.loads((saved / "plans.json").read_text())
    old = {key: index[key] for key in ("format", "model", "plans")}
    (saved / "plans.json").write_text(json.dumps(old))
    plan = json.loads((saved / "plan0_prune.json").read_text())
    del plan["sha256"], plan["plan"]["network"]
    (saved / "plan0_prune.json").write_text(json.dumps(plan))
    found = sk.load(saved, model=_fresh()).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    "read", [artifact.read_json, artifact.read_tensors, artifact.file_hash, sk.Plan.load]
)
def test_a_pipe_is_refused_instead_of_waited_for(
    pipe: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(ArtifactError, match="no regular file"):
        read(pipe)
