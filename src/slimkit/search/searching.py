"""The search loop: propose, check the hard constraints, evaluate, record.

One loop for everything in Slimkit that looks for good settings: what differs is the space, the
sampler, the constraints, and what an evaluation is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from slimkit.doors import door
from slimkit.errors import InputError, SlimkitError, nearest
from slimkit.outside import called, iterated
from slimkit.progress import ProgressDisplay
from slimkit.search.parameters import (
    Parameters,
    SearchSpace,
    Value,
    checked_parameters,
    checked_space,
)
from slimkit.search.samplers import SAMPLERS, Sampler
from slimkit.search.storage import TrialStorage, open_storage
from slimkit.search.values import (
    Candidate,
    Direction,
    Outcome,
    SearchError,
    SearchResult,
    Trial,
)

if TYPE_CHECKING:
    from slimkit.artifact import PathLike

__all__ = ["Constraint", "Executor", "ObjectiveFunction", "search"]

ObjectiveFunction = Callable[[Parameters, Candidate], float | Mapping[str, float]]
"""The objective function: (parameters, candidate) → its value, or several metrics by name."""

Constraint = Callable[[Parameters], str | None]
"""Parameters → what they violate, in words, or None if nothing."""

Executor = Callable[[Callable[[Candidate], Outcome], Sequence[Candidate]], Iterable[Outcome]]
"""What runs evaluations: has the shape of the built-in ``map``, and keeps the order.

``concurrent.futures.ThreadPoolExecutor(4).map`` is one, and ``ray.util.multiprocessing.Pool().map``
another. Both arguments can be pickled if the evaluation can.
"""


@door
def search(  # noqa: PLR0913 - the verb: every choice is a keyword with a default
    space: SearchSpace,
    evaluate: ObjectiveFunction,
    *,
    trials: int,
    sampler: str | Sampler = "tpe",
    constraints: Constraint | Iterable[Constraint] = (),
    objective: str | None = None,
    direction: Direction = "maximize",
    start: Sequence[Parameters] = (),
    key: Callable[[Parameters], Hashable] | None = None,
    storage: PathLike | None = None,
    identity: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 1,
    executor: Executor = map,
    max_failures: int = 10,
    retries: int = 1000,
    progress: bool = True,
    label: str = "search",
) -> SearchResult:
    """Look for the parameters with the best value.

    The sequence of trials follows from the arguments alone: trial ``n`` has its own seed, made
    of (``seed``, ``n``), for the proposal and for the evaluation, and a sampler sees nothing
    but the recorded trials. A search that is killed and called again with the same ``storage``
    therefore ends with the trials of an uninterrupted one.

    Args:
        space: name → :class:`IntRange`, :class:`FloatRange` or :class:`Choice`.
        evaluate: called as ``evaluate(parameters, candidate)``; Python's, NumPy's and torch's
            global generators are seeded with ``candidate.seed`` around it (threads share them:
            use ``candidate.rng()`` there). An exception or a value that is not finite makes a
            failed trial.
        trials: to have in the end, recorded ones of an earlier run included.
        sampler: ``"tpe"``, ``"genetic"``, ``"annealing"``, ``"random"``, or any
            :class:`~slimkit.search.samplers.Sampler`.
        constraints: checked before an evaluation; a candidate that violates one is never
            evaluated.
        objective: the metric to go by, where ``evaluate`` gives several.
        direction: ``"maximize"`` or ``"minimize"``.
        start: points to begin with, before the sampler is asked.
        key: candidates with equal keys count as the same, and the same is not tried twice
            while ``retries`` allows; by default the parameters themselves.
        storage: a file to record the trials in and to resume from; memory without it.
        identity: JSON-able description of what is evaluated (a hash of the weights, the name of
            the data); a file with another one is refused.
        seed: of everything.
        batch: candidates proposed from the same history, so that they can be evaluated side by
            side. It changes the sequence of trials; the executor does not.
        executor: how a batch is evaluated; the built-in ``map`` takes one after the other.
        max_failures: the search ends with an error when more evaluations failed.
        retries: proposals per trial until the constraints are said to reject everything.
        progress: show progress on standard error.
        label: what the progress says.

    Returns:
        All trials, the best among them.

    Raises:
        InputError, UnknownNameError: an argument is wrong, or ``storage`` belongs to a search
            with other arguments.
        SearchError: the constraints reject everything, or too many evaluations failed; its
            ``result`` holds the trials so far.
        ArtifactError: ``storage`` cannot be read or written, or another process is writing it.
    """
    known = checked_space(space)
    ask = _sampler(sampler)
    _check_numbers(trials=trials, batch=batch, retries=retries)
    _check_numbers(least=0, seed=seed, max_failures=max_failures)
    if direction not in get_args(Direction):
        raise InputError(
            f"expected one of {get_args(Direction)}, got {direction!r}", where="direction"
        )
    first = [
        checked_parameters(known, point, where=f"start[{number}]")
        for number, point in enumerate(start)
    ]
    settings = {
        "identity": _plain(identity or {}),
        "space": {name: parameter.to_json() for name, parameter in known.items()},
        "sampler": _described(ask),
        "objective": objective,
        "direction": direction,
        "start": first,
        "seed": seed,
        "batch": batch,
    }
    proposing = _Proposing(
        known,
        ask,
        (constraints,) if callable(constraints) else tuple(constraints),
        _key_of(key),
        first,
        seed,
        retries,
    )
    run = functools.partial(_attempted, evaluate)
    with (
        open_storage(storage, known, direction, settings) as record,
        ProgressDisplay(trials, len(record.trials), label=label, enabled=progress) as show,
    ):
        loop = _Loop(record, proposing, direction, objective, settings, max_failures)
        loop.check_failures()
        while len(record.trials) < trials:
            candidates = loop.proposed(batch, trials)
            asked = [candidate for candidate, _ in candidates]
            outcomes = iterated(
                called(executor, InputError, "executor", run, asked), where="executor"
            )
            for candidate, rejected in candidates:
                trial = loop.recorded(candidate, rejected, outcomes)
                show.step(trial.number + 1, loop.news)
                loop.check_failures()
        return loop.result


def _key_of(key: Callable[[Parameters], Hashable] | None) -> Callable[[Parameters], Hashable]:
    if key is None:
        return lambda parameters: tuple(parameters.values())

    def checked(parameters: Parameters) -> Hashable:
        found: object = called(key, InputError, "key", parameters)
        if not isinstance(found, Hashable):
            raise InputError(
                f"expected something that can be hashed, got {type(found).__name__}", where="key"
            )
        return found

    return checked


@dataclasses.dataclass
class _Loop:
    """The state of a running search: what is recorded."""

    record: TrialStorage
    proposing: _Proposing
    direction: Direction
    objective: str | None
    settings: Mapping[str, Any]
    max_failures: int

    @property
    def result(self) -> SearchResult:
        return SearchResult(tuple(self.record.trials), self.direction, self.settings)

    @property
    def news(self) -> str:
        last = self.record.trials[-1]
        told = str(last.error) if last.value is None else f"{last.value:.5g}"
        if self.result.finished:
            best = self.result.best
            told += f", best {best.value:.5g} (trial {best.number}), {last.seconds:.1f} s"
        return told

    def proposed(self, batch: int, trials: int) -> list[tuple[Candidate, int]]:
        """The rest of the current batch, each with the number of proposals turned down."""
        history = self.record.trials
        done = len(history)
        begin = done - done % batch  # a batch that was interrupted goes on as it began
        seen = {self.proposing.key(trial.parameters) for trial in history}
        candidates = []
        for number in range(done, min(begin + batch, trials)):
            try:
                candidate, rejected = self.proposing(number, history[:begin], seen)
            except SearchError as error:
                error.result = self.result
                raise
            seen.add(self.proposing.key(candidate.parameters))
            candidates.append((candidate, rejected))
        return candidates

    def recorded(self, candidate: Candidate, rejected: int, outcomes: Iterator[Outcome]) -> Trial:
        """Wait for the next outcome and record it."""
        try:
            outcome = next(outcomes)
        except StopIteration:
            raise SearchError(
                f"it gave nothing for trial {candidate.number}",
                where="executor",
                result=self.result,
            ) from None
        if not isinstance(outcome, Outcome):
            raise InputError(
                f"expected what the function returned for each candidate, got "
                f"{type(outcome).__name__}",
                where="executor",
                hint="it has the shape of the built-in map",
            )
        value = self._value(outcome.metrics)
        trial = Trial(
            candidate.number,
            candidate.seed,
            candidate.parameters,
            value,
            value if value is None or self.direction == "maximize" else -value,
            outcome.metrics or {},
            outcome.error,
            rejected,
            outcome.seconds,
        )
        self.record.add(trial)
        return trial

    def check_failures(self) -> None:
        """End the search if too many evaluations failed."""
        failed = [trial for trial in self.record.trials if trial.value is None]
        if len(failed) > self.max_failures:
            raise SearchError(
                f"{len(failed)} of {len(self.record.trials)} evaluations failed, the last with "
                f"{failed[-1].error}",
                where="evaluate",
                hint="mend it, or raise max_failures",
                result=self.result,
            )

    def _value(self, metrics: Mapping[str, float] | None) -> float | None:
        if metrics is None:
            return None
        name = self.objective
        if name is None and len(metrics) == 1:
            (name,) = metrics
        if name is None or name not in metrics:
            raise InputError(
                f"evaluate gives {', '.join(metrics) or 'nothing'}; expected "
                + ("the name of the one to go by" if name is None else repr(name)),
                where="objective",
                hint=nearest(name or "", metrics),
            )
        return metrics[name]


@dataclasses.dataclass(frozen=True)
class _Proposing:
    """(number, history, keys seen) → a candidate that no constraint rejects."""

    space: SearchSpace
    sampler: Sampler
    constraints: Sequence[Constraint]
    key: Callable[[Parameters], Hashable]
    start: Sequence[Parameters]
    seed: int
    retries: int

    def __call__(
        self, number: int, history: Sequence[Trial], seen: set[Hashable]
    ) -> tuple[Candidate, int]:
        import numpy as np

        asking, evaluating = np.random.SeedSequence((self.seed, number)).spawn(2)
        seed = int(evaluating.generate_state(1)[0])
        if number < len(self.start):
            violation = self._violation(self.start[number])
            if violation is not None:
                raise InputError(f"violates a constraint: {violation}", where=f"start[{number}]")
            return Candidate(number, seed, self.start[number]), 0
        rng = np.random.default_rng(asking)
        repeated: dict[str, Value] | None = None
        rejected = 0
        for _ in range(self.retries):
            parameters = checked_parameters(
                self.space, self.sampler.ask(self.space, history, rng), where="sampler"
            )
            violation = self._violation(parameters)
            if violation is not None:
                rejected += 1
                last = violation
            elif self.key(parameters) in seen:
                repeated = parameters
            else:
                return Candidate(number, seed, parameters), rejected
        if repeated is None:
            raise SearchError(
                f"none of {self.retries} proposals satisfies them, the last because {last}",
                where="constraints",
                hint="loosen them, or narrow the space to what they allow",
            )
        return Candidate(number, seed, repeated), rejected  # there is nothing new to try

    def _violation(self, parameters: Parameters) -> str | None:
        for constraint in self.constraints:
            name = getattr(constraint, "__name__", type(constraint).__name__)
            try:
                found: object = constraint(parameters)
            except SlimkitError:
                raise
            except Exception as error:
                raise InputError(
                    f"{name} failed with {type(error).__name__}: {error} for {dict(parameters)}",
                    where="constraints",
                ) from error
            if found is not None and not isinstance(found, str):
                raise InputError(
                    f"{name} gave {found!r}; expected what is violated, in words, or None",
                    where="constraints",
                )
            if found is not None:
                return found
        return None


def _attempted(evaluate: ObjectiveFunction, candidate: Candidate) -> Outcome:
    """Evaluate, and make a mistake an outcome."""
    begin = time.perf_counter()
    try:
        with _seeded(candidate.seed):
            answer: Any = evaluate(candidate.parameters, candidate)
        metrics = answer if isinstance(answer, Mapping) else {"value": answer}
        metrics = {str(name): float(value) for name, value in metrics.items()}
    except Exception as error:
        return Outcome(None, _told(error), time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    wrong = next((name for name in metrics if not math.isfinite(metrics[name])), None)
    if wrong is not None:
        return Outcome(None, f"{wrong} is {metrics[wrong]}", seconds)
    return Outcome(metrics, None, seconds)


def _told(error: Exception) -> str:
    """An error with the place where it happened, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}".strip() + place


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators begin at ``seed``, and are put back."""
    import numpy as np
    import torch

    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - see below
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - users' functions draw from it
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _sampler(choice: str | object) -> Sampler:
    """The sampler that was named or given; of a class an instance with its defaults."""
    found: Any = SAMPLERS.get(choice, where="sampler") if isinstance(choice, str) else choice
    if isinstance(found, type):
        found = found()
    if not callable(getattr(found, "ask", None)):
        raise InputError(
            f"expected a name or an object with ask(space, history, rng), got {found!r}",
            where="sampler",
            hint=nearest("", SAMPLERS),
        )
    return cast("Sampler", found)


def _described(sampler: Any) -> dict[str, Any]:
    """A sampler's type and those of its settings that can be written down."""
    settings: dict[str, Any] = {}
    if dataclasses.is_dataclass(sampler):
        settings = {f.name: getattr(sampler, f.name) for f in dataclasses.fields(sampler)}
    plain = {
        k: v for k, v in settings.items() if v is None or isinstance(v, bool | int | float | str)
    }
    return {"type": type(sampler).__qualname__, **plain}


def _plain(identity: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(identity, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be written as JSON: {error}", where="identity") from error


def _check_numbers(least: int = 1, **numbers: object) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"expected an integer ≥ {least}, got {value!r}", where=name)
