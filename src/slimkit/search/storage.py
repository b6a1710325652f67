"""Where trials are kept: in memory, or in an Optuna journal, one line per trial.

A trial is written when it is complete, with everything that belongs to it, in one appended
line. A process that is killed therefore leaves whole trials and at most one torn line, which
the next one cuts off. ``optuna-dashboard FILE`` shows a journal, also of a running search.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from slimkit.errors import ArtifactError, InputError
from slimkit.locking import file_lock
from slimkit.search.values import Direction, Trial

if TYPE_CHECKING:
    import optuna

    from slimkit.artifact import PathLike
    from slimkit.search.parameters import SearchSpace

__all__ = ["TrialStorage", "first_difference", "open_storage", "quiet_optuna"]

_STUDY = "slimkit"
_PATIENCE = 5.0
"""Seconds to wait for the lock of a file: workers of a killed process may outlive it a little."""


class TrialStorage(Protocol):
    """Where a search keeps its trials."""

    @property
    def trials(self) -> list[Trial]:
        """What is recorded, in order."""

    def add(self, trial: Trial) -> None:
        """Record the next trial for good."""


class _Memory:
    """Trials that are gone with the process."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def add(self, trial: Trial) -> None:
        """Append it."""
        self.trials.append(trial)


@contextlib.contextmanager
def open_storage(
    path: PathLike | None,
    space: SearchSpace,
    direction: Direction,
    settings: Mapping[str, Any],
) -> Iterator[TrialStorage]:
    """The record of a search, for this process alone.

    Args:
        path: of the journal; None keeps the trials in memory.
        space: what is searched.
        direction: of the objective.
        settings: JSON-able; what the sequence of trials follows from.

    Raises:
        ArtifactError: the file is no journal of a search, cannot be written, or is in use.
        InputError: it belongs to a search with other settings.
    """
    if path is None:
        yield _Memory()
        return
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            file.open("ab+") as handle,
            file_lock(
                file.with_name(f".{file.name}.lock"),
                patience=_PATIENCE,
                busy="another search is writing it",
                where=file,
                hint="give another file",
            ),
        ):
            _cut_torn_line(handle, file)
            yield _Journal(file, space, direction, settings)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot write: {error.strerror or error}", where=str(file)) from error


class _Journal:
    """Trials as the lines of a file."""

    def __init__(
        self,
        file: Path,
        space: SearchSpace,
        direction: Direction,
        settings: Mapping[str, Any],
    ) -> None:
        self._file = file
        self._distributions = {name: p.distribution() for name, p in space.items()}
        self._direction = direction
        with quiet_optuna(), _readable(file):
            self._study = _study(file, direction)
            self._check_settings(settings)
            self.trials = [self._read(trial) for trial in self._study.get_trials(deepcopy=False)]

    def add(self, trial: Trial) -> None:
        """Append one line, and make sure that it is on the disk."""
        from optuna.trial import TrialState, create_trial

        record = create_trial(
            params=dict(trial.parameters),
            distributions=self._distributions,
            value=trial.value,
            state=TrialState.FAIL if trial.value is None else TrialState.COMPLETE,
            user_attrs={
                "seed": trial.seed,
                "metrics": dict(trial.metrics),
                "error": trial.error,
                "rejected": trial.rejected,
                "seconds": trial.seconds,
            },
        )
        record.datetime_complete = dt.datetime.now()
        took = dt.timedelta(seconds=trial.seconds)
        record.datetime_start = record.datetime_complete - took
        self._study.add_trial(record)
        self.trials.append(trial)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        here = json.loads(json.dumps(settings))
        held = self._study.user_attrs.get("settings")
        if held is None and not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr("settings", here)
            return
        difference = first_difference(held, here)
        if difference is not None:
            raise InputError(
                f"{self._file} belongs to another search: {difference}",
                where="storage",
                hint="give it the settings that it was begun with, or another file",
            )

    def _read(self, found: optuna.trial.FrozenTrial) -> Trial:
        notes = found.user_attrs
        value = found.values[0] if found.values else None
        score = value if value is None or self._direction == "maximize" else -value
        return Trial(
            number=found.number,
            seed=notes["seed"],
            parameters={name: found.params[name] for name in self._distributions},
            value=value,
            score=score,
            metrics=notes["metrics"],
            error=notes["error"],
            rejected=notes["rejected"],
            seconds=notes["seconds"],
        )


def first_difference(held: Any, here: Any, path: str = "") -> str | None:
    """Where two JSON values differ first, in words; None if they are equal."""
    if isinstance(held, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*held, *here]):
            below = f"{path}.{name}" if path else str(name)
            if name not in held or name not in here:
                return f"{below} is only {'here' if name in here else 'in the file'}"
            found = first_difference(held[name], here[name], below)
            if found is not None:
                return found
        return None
    if held == here:
        return None
    return f"{path or 'it'} is {_short(held)} in the file and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's news of new studies and trials off the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class _Locked:
    """A lock that does nothing, for Optuna: the whole journal is locked already.

    Optuna's own would lock every line with a file that a killed process leaves behind.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


def _study(file: Path, direction: Direction) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    backend = JournalFileBackend(str(file), lock_obj=cast("Any", _Locked()))
    storage = JournalStorage(backend)
    try:  # optuna's own load_if_exists would add a line each time
        return optuna.load_study(study_name=_STUDY, storage=storage)
    except KeyError:
        return optuna.create_study(study_name=_STUDY, storage=storage, direction=direction)


def _cut_torn_line(handle: IO[bytes], file: Path) -> None:
    """Remove the end of a line that a killed process did not complete."""
    handle.seek(0)
    start = handle.read(16)
    if not start:
        return
    if not start.startswith(b'{"op_code"'[: len(start)]):
        raise _no_journal(file, "its first line is none of a journal")
    handle.seek(0)
    content = handle.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        handle.truncate(whole)
        handle.flush()
        os.fsync(handle.fileno())


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Errors of Optuna about a damaged file as :class:`ArtifactError`."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:  # it trusts its files: anything can come
        raise _no_journal(file, f"{type(error).__name__}: {error}") from error


def _no_journal(file: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"not the journal of a search, or damaged ({why})",
        where=str(file),
        hint="give a new file",
    )
