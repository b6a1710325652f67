# ruff: noqa: NPY002 - that the global generators are seeded is what is tested
from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimkit.errors import ArtifactError, InputError, UnknownNameError
from slimkit.search import (
    SAMPLERS,
    AnnealingSampler,
    Choice,
    FloatRange,
    GeneticSampler,
    IntRange,
    SearchError,
    SearchResult,
    TPESampler,
    search,
    storage,
)

SPACE = {
    "width": IntRange(8, 64, step=8),
    "rate": FloatRange(1e-4, 1.0, log=True),
    "kind": Choice("plain", "wide", None),
}
BOX = {"x": FloatRange(-1.0, 1.0), "y": FloatRange(-1.0, 1.0)}
# Small enough that every one of them leaves its random phase within a few trials.
QUICK = [
    "random",
    TPESampler(startup=3, candidates=4),
    GeneticSampler(population=4),
    AnnealingSampler(),
]
ids = [getattr(s, "__class__", s).__name__ if not isinstance(s, str) else s for s in QUICK]


def bowl(parameters: Any, candidate: Any) -> float:
    return -((parameters["x"] - 0.3) ** 2) - (parameters["y"] + 0.2) ** 2


def global_numbers() -> tuple[float, ...]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


def mixed(parameters: Any, candidate: Any) -> dict[str, float]:
    bonus = {"plain": 0.0, "wide": 1.0, None: 0.5}[parameters["kind"]]
    noise = sum(global_numbers()) + candidate.rng().random()
    return {"gain": parameters["width"] / 64 + bonus + 0.01 * noise, "rate": parameters["rate"]}


def found(result: SearchResult) -> list[tuple[Any, ...]]:
    """What must be equal in a repeated search: everything but the time."""
    return [
        (t.number, t.seed, t.parameters, t.value, dict(t.metrics), t.error, t.rejected)
        for t in result.trials
    ]


def run(evaluate: Any = mixed, space: Any = SPACE, **options: Any) -> SearchResult:
    if evaluate is mixed:
        options.setdefault("objective", "gain")
    return search(space, evaluate, **{"trials": 8, "progress": False, **options})


# --- the sequence of trials ----------------------------------------------------------------


@pytest.mark.parametrize("sampler", QUICK, ids=ids)
def test_the_same_seed_gives_the_same_trials_and_another_one_others(sampler: Any) -> None:
    assert found(run(sampler=sampler)) == found(run(sampler=sampler))
    assert found(run(sampler=sampler)) != found(run(sampler=sampler, seed=1))


@pytest.mark.parametrize("sampler", QUICK, ids=ids)
def test_a_search_in_pieces_equals_one_in_one_piece(sampler: Any, tmp_path: Path) -> None:
    whole = run(sampler=sampler)
    for trials in (1, 5, 5, 8):
        pieces = run(sampler=sampler, trials=trials, storage=tmp_path / "trials.log")
    assert found(pieces) == found(whole)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def deadly(parameters: Any, candidate: Any) -> Any:
        if candidate.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return mixed(parameters, candidate)

    file = tmp_path / "trials.log"
    child = os.fork()
    if child == 0:
        run(deadly, sampler=QUICK[2], objective="gain", storage=file)
        os._exit(1)  # not reached
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(run(trials=1, sampler=QUICK[2], storage=file).trials) == 5
    assert found(run(sampler=QUICK[2], storage=file)) == found(run(sampler=QUICK[2]))


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "trials.log"
    run(trials=4, storage=file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert found(run(trials=4, storage=file)) == found(run(trials=4))
    assert len(file.read_bytes().splitlines()) == len(whole.splitlines())


def test_each_trial_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "trials.log"
    run(trials=1, storage=file)
    lines = len(file.read_bytes().splitlines())
    run(trials=4, storage=file)
    assert len(file.read_bytes().splitlines()) == lines + 3


def test_what_is_recorded_is_what_was_found(tmp_path: Path) -> None:
    file = tmp_path / "trials.log"

    def fails_once(parameters: Any, candidate: Any) -> Any:
        if candidate.number == 2:
            raise RuntimeError("no luck")
        return mixed(parameters, candidate)

    first = run(fails_once, objective="gain", trials=4, storage=file, direction="minimize")
    again = run(fails_once, objective="gain", trials=4, storage=file, direction="minimize")
    assert [trial.to_json() for trial in again.trials] == [t.to_json() for t in first.trials]
    assert [t.score for t in again.trials] == [t.score for t in first.trials]
    assert again.trials[2].error is not None
    assert "no luck" in again.trials[2].error


def test_the_global_generators_are_seeded_inside_and_untouched_outside() -> None:
    def seed_and_draw(between: Callable[[], Any]) -> tuple[float, ...]:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        between()
        return global_numbers()

    assert seed_and_draw(lambda: run(trials=2)) == seed_and_draw(lambda: None)


def test_start_points_come_first() -> None:
    start = [{"width": 64, "rate": 0.5, "kind": None}, {"kind": "wide", "width": 8, "rate": 1}]
    result = run(trials=3, start=start)
    assert [trial.parameters for trial in result.trials[:2]] == start


# --- batches and executors -----------------------------------------------------------------


def test_the_executor_does_not_change_the_trials() -> None:
    options: dict[str, Any] = {"sampler": AnnealingSampler(), "batch": 3}
    with ThreadPoolExecutor(3) as pool:
        side_by_side = run(bowl, BOX, executor=pool.map, **options)
    assert found(side_by_side) == found(run(bowl, BOX, **options))
    assert found(side_by_side) != found(run(bowl, BOX, **{**options, "batch": 1}))


def test_a_batch_that_was_interrupted_goes_on_as_it_began(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": 3, "sampler": GeneticSampler(population=2)}
    for trials in (4, 5, 8):
        pieces = run(trials=trials, storage=tmp_path / "trials.log", **options)
    assert found(pieces) == found(run(**options))


def test_work_can_be_sent_to_other_processes() -> None:
    def elsewhere(run: Any, candidates: Any) -> Any:
        run, candidates = pickle.loads(pickle.dumps((run, candidates)))
        return pickle.loads(pickle.dumps(list(map(run, candidates))))

    evaluate = partial(pow, mod=None)  # of a module: pow(parameters, candidate) fails
    options: dict[str, Any] = {"trials": 4, "batch": 2}
    sent = run(evaluate, BOX, executor=elsewhere, **options)
    assert found(sent) == found(run(evaluate, BOX, **options))
    assert "TypeError" in str(sent.trials[0].error)


def test_an_executor_that_loses_trials_is_named() -> None:
    with pytest.raises(SearchError, match="executor: it gave nothing for trial 0"):
        run(executor=lambda run, candidates: [])


# --- constraints ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", QUICK, ids=ids)
def test_a_rejected_candidate_is_never_evaluated(sampler: Any) -> None:
    def narrow(parameters: Any) -> str | None:
        return None if parameters["x"] > parameters["y"] else "x ≤ y"

    def evaluate(parameters: Any, candidate: Any) -> float:
        assert parameters["x"] > parameters["y"]
        return bowl(parameters, candidate)

    result = run(evaluate, BOX, sampler=sampler, trials=12, constraints=narrow)
    assert len(result.finished) == 12
    assert sum(trial.rejected for trial in result.trials) > 0


def test_a_constraint_that_rejects_everything_is_an_error_that_keeps_the_trials() -> None:
    def only_once(parameters: Any) -> str | None:
        return "too wide" if parameters["x"] != 0 else None

    with pytest.raises(SearchError, match=r"none of 20 proposals .* too wide") as caught:
        run(bowl, BOX, start=[{"x": 0, "y": 0}], constraints=[only_once], retries=20)
    assert caught.value.where == "constraints"
    assert caught.value.result is not None
    assert len(caught.value.result.finished) == 1


def test_a_start_that_violates_a_constraint_is_refused() -> None:
    with pytest.raises(InputError, match=r"start\[0\]: violates a constraint: never"):
        run(bowl, BOX, start=[{"x": 0, "y": 0}], constraints=lambda parameters: "never")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [(lambda p: p["z"], "failed with KeyError"), (lambda p: True, "gave True; expected")],
)
def test_a_constraint_that_is_none_is_named(constraint: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(bowl, BOX, constraints=constraint)


def test_nothing_is_tried_twice_while_there_is_something_new() -> None:
    space = {"n": IntRange(0, 3)}
    result = run(lambda p, _: -p["n"], space, sampler="annealing", trials=6)
    numbers = [trial.parameters["n"] for trial in result.trials]
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert len(numbers) == 6


def test_equal_keys_count_as_the_same_candidate() -> None:
    space = {"n": IntRange(0, 99)}
    result = run(lambda p, _: p["n"], space, sampler="random", trials=4, key=lambda p: p["n"] // 25)
    assert {int(str(t.parameters["n"])) // 25 for t in result.trials} == {0, 1, 2, 3}


# --- failures ------------------------------------------------------------------------------


def test_failed_evaluations_are_recorded_and_the_search_goes_on() -> None:
    def shaky(parameters: Any, candidate: Any) -> float:
        if candidate.number % 3 == 1:
            raise ValueError("not this one")
        return float("nan") if candidate.number % 3 == 2 else bowl(parameters, candidate)

    result = run(shaky, BOX, sampler=GeneticSampler(population=2), trials=9)
    assert [trial.number for trial in result.finished] == [0, 3, 6]
    assert result.trials[2].error == "value is nan"
    assert str(result.trials[1].error).startswith("ValueError: not this one (test_searching.py:")
    assert result.best.value == max(t.value for t in result.finished if t.value is not None)


def test_too_many_failures_end_the_search_and_nothing_is_lost(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(parameters: Any, candidate: Any) -> float:
        calls.append(candidate.number)
        raise OSError("disk on fire")

    file = tmp_path / "trials.log"
    with pytest.raises(SearchError, match=r"3 of 3 evaluations failed.*disk on fire") as caught:
        run(broken, BOX, max_failures=2, storage=file)
    assert caught.value.result is not None
    assert len(caught.value.result.trials) == 3
    with pytest.raises(SearchError, match="3 of 3"):  # without trying again
        run(broken, BOX, max_failures=2, storage=file)
    assert calls == [0, 1, 2]
    assert len(run(bowl, BOX, max_failures=3, storage=file).trials) == 8


def test_a_search_without_a_success_has_no_best() -> None:
    result = run(lambda p, _: float("inf"), BOX, trials=2)
    with pytest.raises(SearchError, match="no evaluation succeeded"):
        _ = result.best
    assert result.to_json()["best"] is None


def test_an_interrupt_is_not_swallowed(tmp_path: Path) -> None:
    def interrupted(parameters: Any, candidate: Any) -> float:
        if candidate.number == 2:
            raise KeyboardInterrupt
        return bowl(parameters, candidate)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, BOX, storage=tmp_path / "trials.log")
    assert found(run(bowl, BOX, storage=tmp_path / "trials.log")) == found(run(bowl, BOX))


# --- the record ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 in the file and 1 here"),
        ({"sampler": GeneticSampler(population=5)}, "sampler.population is 4 in the file and 5"),
        ({"sampler": "random"}, 'sampler.type is "GeneticSampler" in the file'),
        ({"space": {**SPACE, "width": IntRange(8, 32)}}, "space.width.high is 64 in the file"),
        ({"space": {**SPACE, "more": IntRange(0, 1)}}, "space.more is only here"),
        ({"identity": {"weights": "b"}}, 'identity.weights is "a" in the file and "b" here'),
    ],
)
def test_the_record_of_another_search_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "sampler": QUICK[2],
        "identity": {"weights": "a"},
        "storage": tmp_path / "trials.log",
        "trials": 2,
    }
    run(**options)
    before = (tmp_path / "trials.log").read_bytes()
    with pytest.raises(InputError, match=message):
        run(**{**options, **change})
    assert (tmp_path / "trials.log").read_bytes() == before


@pytest.mark.parametrize("content", [b"hello", b'{"name": 1}\n', b'{"op_code": 99}\n'])
def test_a_file_that_is_no_record_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="not the journal of a search"):
        run(storage=file)
    assert file.read_bytes() == content


def test_a_folder_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        run(storage=tmp_path)


def test_two_searches_cannot_write_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_PATIENCE", 0.0)
    file = tmp_path / "trials.log"

    def nested(parameters: Any, candidate: Any) -> float:
        with pytest.raises(ArtifactError, match="another search is writing it"):
            run(storage=file)
        return 0.0

    assert len(run(nested, BOX, trials=1, storage=file).finished) == 1


def test_optuna_reads_the_record(tmp_path: Path) -> None:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    result = run(storage=tmp_path / "trials.log", sampler="random")
    backend = JournalFileBackend(str(tmp_path / "trials.log"))
    study = optuna.load_study(study_name="slimkit", storage=JournalStorage(backend))
    assert study.best_trial.number == result.best.number
    assert study.best_params == result.best.parameters


# --- arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"space": {}}, InputError, "space: expected a mapping"),
        ({"space": {"x": (0, 1)}}, InputError, "space.x: expected a Parameter"),
        ({"trials": 0}, InputError, "trials: expected an integer ≥ 1"),
        ({"batch": 1.5}, InputError, "batch: expected an integer"),
        ({"seed": -1}, InputError, "seed: expected an integer ≥ 0"),
        ({"direction": "up"}, InputError, "direction: expected maximize or minimize"),
        ({"sampler": "gentic"}, UnknownNameError, "did you mean 'genetic'"),
        ({"sampler": 3}, InputError, "sampler: expected text or a Sampler"),
        ({"objective": "gian"}, InputError, "objective: .*did you mean 'gain'"),
        ({"objective": None}, InputError, "evaluate gives gain, rate; expected the name"),
        ({"start": [{"width": 8}]}, InputError, r"start\[0\]: the parameter 'rate' is missing"),
        (
            {"start": [{"width": 9, "rate": 1, "kind": None}]},
            InputError,
            r"start\[0\].width: expected one of 8 … 64 in steps of 8, got 9",
        ),
        (
            {"start": [{"width": 8, "rate": 1, "kind": None, "knd": 1}]},
            InputError,
            "no parameter 'knd' .did you mean 'kind'",
        ),
        ({"identity": {"model": object()}}, InputError, "identity: cannot be written as JSON"),
    ],
)
def test_a_wrong_argument_is_named(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(**change)


def test_a_sampler_of_your_own_needs_one_method() -> None:
    with SAMPLERS.scratch():

        @SAMPLERS.register("corner")
        class Corner:
            def ask(self, space: Any, history: Sequence[Any], rng: Any) -> Any:
                return {name: parameter.low for name, parameter in space.items()}

        result = run(bowl, BOX, sampler="corner", trials=2)
    assert [dict(t.parameters) for t in result.trials] == [{"x": -1.0, "y": -1.0}] * 2


def test_a_sampler_that_leaves_the_space_is_named() -> None:
    class Wild:
        ask: Callable[..., Any] = staticmethod(lambda space, history, rng: {"x": 2, "y": 0})

    with pytest.raises(InputError, match=r"sampler\.x: expected a number in -1 … 1, got 2"):
        run(bowl, BOX, sampler=Wild())


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    run(bowl, BOX, trials=2, progress=True, label="hunt")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "hunt 2/2" in captured.err
