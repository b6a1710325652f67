"""What a search passes around and leaves: candidates, outcomes, trials, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from slimkit.errors import SlimkitError

if TYPE_CHECKING:
    import numpy as np

    from slimkit.search.parameters import Parameters

__all__ = ["Candidate", "Direction", "Outcome", "SearchError", "SearchResult", "Trial"]

Direction = Literal["maximize", "minimize"]


class SearchError(SlimkitError, RuntimeError):
    """A search cannot go on; what it found so far is in :attr:`result`.

    Attributes:
        result: every trial that was recorded; None where there is nothing yet.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        result: SearchResult | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.result = result


@dataclass(frozen=True)
class Candidate:
    """What is to be evaluated.

    Attributes:
        number: of the trial that it becomes, from 0.
        seed: its own, made of the seed of the search and the number; below 2³².
        parameters: one value per name.
    """

    number: int
    seed: int
    parameters: Parameters

    def rng(self) -> np.random.Generator:
        """Random numbers for this trial alone, the same whenever it is repeated."""
        import numpy as np

        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave.

    Attributes:
        metrics: name → finite number; None if it failed.
        error: what went wrong; None if nothing did.
        seconds: that it took.
    """

    metrics: Mapping[str, float] | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One evaluated candidate, as it is recorded.

    Attributes:
        number: position in the sequence, from 0.
        seed: see :attr:`Candidate.seed`.
        parameters: one value per name.
        value: of the objective; None if the evaluation failed.
        score: the value with its sign turned if the search minimizes: higher is better. This
            is what samplers look at.
        metrics: everything that the evaluation gave.
        error: why it failed, or None.
        rejected: proposals that a hard constraint turned down before this one.
        seconds: of the evaluation.
    """

    number: int
    seed: int
    parameters: Parameters
    value: float | None
    score: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    rejected: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything that was recorded."""
        return {
            "number": self.number,
            "seed": self.seed,
            "parameters": dict(self.parameters),
            "value": self.value,
            "metrics": dict(self.metrics),
            "error": self.error,
            "rejected": self.rejected,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, in their order.

    Attributes:
        trials: finished and failed ones.
        direction: ``"maximize"`` or ``"minimize"``.
        settings: space, sampler, seed: what the sequence of trials follows from.
    """

    trials: Sequence[Trial]
    direction: Direction
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[Trial]:
        """Those that have a value."""
        return [trial for trial in self.trials if trial.value is not None]

    @property
    def best(self) -> Trial:
        """The trial with the best value; of several equal ones the first.

        Raises:
            SearchError: no evaluation succeeded.
        """
        finished = self.finished
        if not finished:
            raise SearchError("no evaluation succeeded", where="search", result=self)
        return max(finished, key=lambda trial: (trial.score or 0.0, -trial.number))

    def to_json(self) -> dict[str, Any]:
        """Settings, the number of the best trial, and all trials."""
        return {
            "direction": self.direction,
            "settings": dict(self.settings),
            "best": self.best.number if self.finished else None,
            "trials": [trial.to_json() for trial in self.trials],
        }
