"""``--dry-run``: what a recipe would do, found out on untrained weights."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from slimkit.measure.profiling import profile
from slimkit.recipe.chains import Chain, ChainStep, of_stage
from slimkit.recipe.workbench import Workbench
from slimkit.tasks.splits import some_examples

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

__all__ = ["Preview", "PreviewRow", "preview_recipe", "time_left"]

_TIMED_STEPS = 2
_TIMED_BATCH = 16
_WITHOUT_TRAINING = 5.0
"""Seconds of a stage that does not train."""


@dataclass(frozen=True)
class PreviewRow:
    """One stage of one variant.

    Attributes:
        variant: its name.
        stage, type: of the stage; ``"model"`` for what the recipe starts from.
        params, macs: after the stage; with pruning by trained weights they come out near.
        cached: whether the result is in the cache.
        shared: whether an earlier row of the table is the same work.
        seconds: estimate of the time it takes; 0 when cached or shared, None when unknown.
    """

    variant: str
    stage: str
    type: str
    params: int
    macs: int
    cached: bool
    shared: bool
    seconds: float | None


@dataclass(frozen=True)
class Preview:
    """The outcome of a dry run; print :meth:`table`."""

    name: str
    data: Mapping[str, Any]
    rows: tuple[PreviewRow, ...]

    @property
    def seconds(self) -> float:
        """Estimate for all stages that are left to run."""
        return sum(row.seconds or 0.0 for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [dict(vars(row)) for row in self.rows]
        return {"name": self.name, "data": dict(self.data), "rows": rows, "seconds": self.seconds}

    def table(self) -> Table:
        """A rich table."""
        from rich.table import Table

        from slimkit.measure.tables import human_count

        table = Table(title=f"{self.name}: dry run", title_justify="left", box=None, pad_edge=False)
        for heading in ("variant", "stage", "type"):
            table.add_column(heading, no_wrap=True)
        for heading in ("params", "MACs", "state", "estimate"):
            table.add_column(heading, justify="right", no_wrap=True)
        variant = None
        for row in self.rows:
            state = "as above" if row.shared else "cached" if row.cached else "to run"
            table.add_row(
                row.variant if row.variant != variant else "",
                row.stage,
                row.type,
                human_count(row.params),
                human_count(row.macs),
                "" if row.type == "" else state,
                _duration(row.seconds) if state == "to run" and row.type else "",
            )
            variant = row.variant
        table.add_row("", "", "", "", "", "total", _duration(self.seconds), style="bold")
        return table


def preview_recipe(bench: Workbench) -> Preview:
    """Walk through all variants without training or testing anything.

    Raises:
        SlimkitError: a stage's settings do not fit its network.
    """
    clock = functools.cache(lambda: _StepClock(bench))  # reads data: only where it must
    seen: set[Chain] = set()
    rows: list[PreviewRow] = []
    for variant, chain in bench.recipe.variants.items():
        for end in range(len(chain) + 1):
            part = chain[:end]
            model = bench.preview(part)
            costs = profile(model, bench.example_inputs)
            cached, shared = bool(part) and bench.is_cached(part), of_stage(part) in seen
            seconds: float | None = 0.0
            if part and not cached and not shared:
                seconds = _estimate(bench, bench.steps[part], model, clock)
            stage = bench.steps[part] if part else None
            rows.append(
                PreviewRow(
                    variant=variant,
                    stage=part[-1] if stage else "(model)",
                    type=stage.settings.type if stage else "",
                    params=costs.params,
                    macs=costs.macs,
                    cached=cached,
                    shared=shared,
                    seconds=seconds,
                )
            )
            seen.add(of_stage(part))
    return Preview(bench.recipe.name, bench.data_facts(), tuple(rows))


def _estimate(
    bench: Workbench, step: ChainStep, model: nn.Module, clock: Callable[[], _StepClock]
) -> float | None:
    """Seconds for a stage: as long as it took before, or its steps times a measured step."""
    earlier = bench.note("timings", bench.keys.work(step))
    if isinstance(earlier, int | float):
        return float(earlier)
    epochs = step.settings.training_epochs()
    if not epochs:
        return _WITHOUT_TRAINING if step.settings.type in {"prune", "ptq"} else None
    samples = epochs * bench.splits.train.samples
    per_sample = clock().training(model)
    for network in bench.preview_teachers(step).values():
        per_sample += clock().inference(network)
    factor = 2.0 if step.settings.type == "qat" else 1.0  # simulated rounding costs as much again
    seconds = samples * per_sample * factor
    minutes = getattr(step.settings, "minutes", None)
    return min(seconds, 60 * minutes) if minutes else seconds


def time_left(bench: Workbench) -> tuple[int, float | None]:
    """Stages that have not run, and the seconds they take by the speed of those that have.

    As long as they took in an earlier run; else multiply-accumulates of all forward and backward
    passes over the rate of the training stages of this run. None: nothing was trained so far.
    """
    spent = work = 0.0
    open_steps: dict[Chain, float | None] = {}
    for chain in bench.recipe.variants.values():
        for end in range(1, len(chain) + 1):
            step = bench.steps[chain[:end]]
            ran = bench.ran(chain[:end])
            if ran is None:
                open_steps[of_stage(chain[:end])] = _work(bench, step)
            elif not ran.cached and (done := _work(bench, step)):
                spent, work = spent + ran.seconds, work + done
    if not work:
        return len(open_steps), None
    seconds = 0.0
    for known, amount in open_steps.items():
        earlier = bench.note("timings", bench.keys.work(bench.steps[known]))
        estimate = amount * spent / work if amount else _WITHOUT_TRAINING
        minutes = getattr(bench.steps[known].settings, "minutes", None)
        estimate = min(estimate, 60 * minutes) if minutes else estimate
        seconds += float(earlier) if isinstance(earlier, int | float) else estimate
    return len(open_steps), seconds


def _work(bench: Workbench, step: ChainStep) -> float:
    """Multiply-accumulates of a stage's training; backward costs twice a forward."""
    samples = step.settings.training_epochs() * bench.splits.train.samples
    if not samples:
        return 0.0
    macs = 3 * profile(bench.preview(step.parent), bench.example_inputs).macs
    for teacher in bench.preview_teachers(step).values():
        macs += profile(teacher, bench.example_inputs).macs
    return samples * macs * (2.0 if step.settings.type == "qat" else 1.0)


class _StepClock:
    """Seconds per sample, measured on a few small batches."""

    def __init__(self, bench: Workbench) -> None:
        self.task = bench.task
        self.batch = some_examples(bench.splits.train, _TIMED_BATCH)
        self.samples = self.batch.size or 1

    def training(self, model: nn.Module) -> float:
        model.train()

        def step() -> None:
            torch.autograd.backward(self.task.loss(model, self.batch)[0])

        return self._time(step)

    def inference(self, model: nn.Module) -> float:
        model.eval()

        def step() -> None:
            with torch.no_grad():
                self.task.teacher_inputs(self.batch).run(model)

        return self._time(step)

    def _time(self, step: Any) -> float:
        step()
        started = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            step()
        return (time.perf_counter() - started) / (_TIMED_STEPS * self.samples)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
