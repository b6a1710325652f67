from __future__ import annotations

import errno
import multiprocessing
import time
from pathlib import Path
from typing import Any

import filelock
import pytest

from slimkit.errors import ArtifactError
from slimkit.locking import file_lock


def _hold(path: str, held: Any) -> None:
    with file_lock(path):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path / "x.lock"), held), daemon=True)
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path, holder: Any) -> None:
    told: list[str] = []

    def waiting() -> None:
        told.append("waiting")
        holder.kill()

    with file_lock(tmp_path / "x.lock", waiting=waiting):
        assert told == ["waiting"]


def test_whoever_does_not_wait_is_told_what_is_busy(tmp_path: Path, holder: Any) -> None:
    lock = file_lock(tmp_path / "x.lock", patience=0.0, busy="in use", where="k", hint="take y")
    with pytest.raises(ArtifactError, match=r"^k: in use \(take y\)$"), lock:
        pass


def test_a_lock_can_be_taken_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="inside"), file_lock(tmp_path / "x.lock"):
        raise OSError("inside")
    with file_lock(tmp_path / "x.lock", patience=0.0):
        pass


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with file_lock(tmp_path / "x.lock"):
        pass


def test_a_place_that_is_not_writable_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"), file_lock(tmp_path / "file" / "x"):
        pass
