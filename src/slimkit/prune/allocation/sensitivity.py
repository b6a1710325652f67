"""Sensitivity-based allocation: layers that matter less lose more (Li et al. 2017, section 4.2).

Every unit is pruned alone at several ratios and the network evaluated without training. The
allocation then takes from each unit what it can give below one threshold of the loss, and
finds the threshold that meets the target.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError, PlanError
from slimkit.modules import copy_module
from slimkit.prune.allocation.curves import SensitivityCurves
from slimkit.prune.fitting import rounded
from slimkit.prune.targets import is_number
from slimkit.search.measured_points import check_evaluation, grow

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

    from slimkit.prune.prune_space import Proposal, PruneSpace, Unit
    from slimkit.prune.targets import RemovalTarget

__all__ = ["RATIOS", "Sensitivity", "measure_sensitivity"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Where curves are measured unless other ratios are given."""


@door
@dataclass(frozen=True)
class Sensitivity:
    """Units lose what they can below one threshold of the loss.

    Needs ``evaluate``, on training or validation data: it is called once for the unpruned
    network and once for every unit and ratio (with 9 ratios and 20 units 181 times).

    Attributes:
        ratios: parts of a unit that are tried, rounded to what it may keep.
        file: JSON that every point is added to as soon as it is measured; what it holds is
            not measured again, but for two points that show whether ``evaluate`` is the same.
            None keeps nothing.
        workers: processes that measure side by side.
    """

    ratios: Sequence[float] = RATIOS
    file: PathLike | None = field(default=None, repr=False)  # places, no part of the method
    workers: int = field(default=1, repr=False)

    def __call__(self, space: PruneSpace, _target: RemovalTarget) -> Proposal:
        """Measure what is missing, and propose."""
        return measure_sensitivity(
            space,
            ratios=self.ratios,
            file=self.file,
            workers=self.workers,
            progress=space.progress,
        ).proposal(space)


@door
def measure_sensitivity(
    space: PruneSpace,
    *,
    ratios: Sequence[float] = RATIOS,
    file: PathLike | None = None,
    workers: int = 1,
    part: tuple[int, int] = (1, 1),
    progress: bool = True,
) -> SensitivityCurves:
    """Prune every unit alone at every ratio and evaluate.

    Args:
        space: of :func:`slimkit.prune.prune_space`, with ``evaluate``.
        ratios: parts that go, between 0 and 1.
        file: grows by every point and is resumed from; see :class:`Sensitivity`.
        workers: processes on this machine. They are forked, each with one thread.
        part: (i, n) measures the i-th of n parts, i from 1: for n machines, each with a file
            of its own, joined by :func:`~slimkit.prune.allocation.curves.merge_sensitivities`.
        progress: show progress on standard error.

    Returns:
        What the file holds in the end.

    Raises:
        InputError: an argument is wrong, or the space has no ``evaluate``.
        PlanError: an evaluation failed or gave no finite number (names unit and ratio), or the
            file belongs to another network or evaluation; it keeps what was measured.
        ArtifactError: the file cannot be read or written.
    """
    _check(ratios, workers, part)
    curves = SensitivityCurves.of(space)
    if file is not None and Path(file).exists():
        curves = curves.joined(SensitivityCurves.load(file), where=str(file))
        if space.evaluate is not None:
            check_evaluation(_known(space, curves), where=str(file), error=PlanError)
    first, parts = part
    todo = [] if curves.base is not None else [_Point("", 0, 0, 0.0, {})]
    for unit in space.units[first - 1 :: parts]:
        known = curves.units[unit.name].values
        todo += [point for point in _points(space, unit, ratios) if point.kept not in known]
    if todo:
        _check_able(space, workers)
    with _values(space, todo, min(workers, len(todo))) as values:
        return grow(
            curves,
            values,
            lambda known, point, value: point.added(known, value),
            total=len(todo),
            told=lambda point, known: f"{point}: {point.value(known):.5g}",
            save=None if file is None else lambda known: known.save(file),
            progress=progress,
        )


@dataclass(frozen=True)
class _Point:
    """One evaluation: a unit that keeps so many channels; without a name the whole network."""

    unit: str
    kept: int
    size: int
    ratio: float
    counts: Mapping[str, int]

    def __str__(self) -> str:
        if not self.unit:
            return "the unpruned network"
        return f"{self.unit} at ratio {self.ratio:g} ({self.kept} of {self.size} channels)"

    def added(self, curves: SensitivityCurves, value: float) -> SensitivityCurves:
        """The curves with this point."""
        if self.unit:
            return curves.with_point(self.unit, self.kept, value)
        return curves.with_base(value)

    def value(self, curves: SensitivityCurves) -> float:
        """The metric that the curves hold for this point."""
        value = curves.units[self.unit].values[self.kept] if self.unit else curves.base
        assert value is not None
        return value

    def measured(self, space: PruneSpace) -> float:
        """The metric; raises PlanError that says where it failed."""
        model = space.pruned(self.counts) if self.unit else copy_module(space.model).eval()
        assert space.evaluate is not None
        try:
            value = float(space.evaluate(model))
            if not math.isfinite(value):
                raise PlanError(f"the evaluation gave {value}")
        except Exception as error:
            what = getattr(error, "message", f"{type(error).__name__}: {error}")
            raise PlanError(
                f"{self}: {what}",
                where="evaluate",
                hint="what was measured before is kept where a file was given",
            ) from error
        return value


def _known(
    space: PruneSpace, curves: SensitivityCurves
) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """The unpruned network, and the point at which the metric falls most, to measure again."""
    if curves.base is None:
        return
    whole = _Point("", 0, 0, 0.0, {})
    yield str(whole), curves.base, lambda: whole.measured(space)
    known = []
    for unit in space.units:
        values = curves.units[unit.name].values
        points = _points(space, unit, [1.0 - kept / unit.size for kept in values])
        known += [point for point in points if point.kept in values]
    if known:
        worst = min(known, key=lambda point: point.value(curves))
        yield str(worst), worst.value(curves), lambda: worst.measured(space)


def _points(space: PruneSpace, unit: Unit, ratios: Sequence[float]) -> list[_Point]:
    """Different numbers of channels nearest to the ratios, most channels first."""
    whole = {group.name: group.size for group in space.groups}
    found: dict[int, _Point] = {}
    for ratio in sorted(ratios):
        kept = rounded(unit.size * (1.0 - ratio), unit.counts)
        if kept < unit.size and kept not in found:
            level = unit.levels[unit.counts.index(kept)]
            counts = {**whole, **dict(zip(unit.groups, level, strict=True))}
            found[kept] = _Point(unit.name, kept, unit.size, ratio, counts)
    return list(found.values())


@contextlib.contextmanager
def _values(
    space: PruneSpace, points: Sequence[_Point], workers: int
) -> Iterator[Iterator[tuple[_Point, float]]]:
    """Measure points, one after the other or in forked processes; in any order."""
    if workers <= 1:
        yield ((point, point.measured(space)) for point in points)
        return
    fork = multiprocessing.get_context("fork")
    processes: list[ForkProcess] = []
    pipes: list[Connection] = []
    try:
        for number in range(workers):
            here, there = fork.Pipe(duplex=False)
            share = range(number, len(points), workers)
            process = fork.Process(target=_work, args=(space, points, share, there))
            process.start()
            there.close()  # the process holds the only end: when it dies, the pipe says so
            processes.append(process)
            pipes.append(here)
        yield _received(points, pipes)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        for pipe in pipes:
            pipe.close()


def _work(
    space: PruneSpace, points: Sequence[_Point], share: Sequence[int], pipe: Connection
) -> None:
    """What a process does: (index, value) for each of its points, or what went wrong."""
    torch.set_num_threads(1)  # the thread pool of the parent does not exist here
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        for index in share:
            pipe.send((index, None))  # begun
            try:
                pipe.send((index, points[index].measured(space)))
            except PlanError as error:
                pipe.send((index, (error.message, error.where, error.hint)))
                return


def _received(
    points: Sequence[_Point], pipes: Sequence[Connection]
) -> Iterator[tuple[_Point, float]]:
    """What the processes send, until all are through."""
    begun: dict[Connection, int] = {}
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in wait(open_pipes):
            assert isinstance(pipe, Connection)
            try:
                index, answer = pipe.recv()
            except EOFError:
                if pipe in begun:
                    raise PlanError(
                        f"{points[begun[pipe]]}: the process died", where="workers"
                    ) from None
                open_pipes.remove(pipe)
                continue
            if answer is None:
                begun[pipe] = index
            elif isinstance(answer, tuple):
                message, where, hint = answer
                raise PlanError(message, where=where, hint=hint)
            else:
                del begun[pipe]
                yield points[index], answer


def _check(ratios: Sequence[float], workers: int, part: tuple[int, int]) -> None:
    wrong = [ratio for ratio in ratios if not is_number(ratio) or not 0 < ratio < 1]
    if wrong or not ratios:
        raise InputError(
            f"expected numbers between 0 and 1, got {list(wrong) or ratios}", where="ratios"
        )
    if not is_number(workers) or workers < 1 or workers != int(workers):
        raise InputError(f"expected a whole number ≥ 1, got {workers!r}", where="workers")
    first, parts = part
    if not 1 <= first <= parts:
        raise InputError(
            f"expected (i, n) with i from 1 to n, got {part!r}",
            where="part",
            hint="(1, 4) is the first of four parts",
        )


def _check_able(space: PruneSpace, workers: int) -> None:
    if space.evaluate is None:
        raise InputError(
            "the sensitivity of layers is measured with it",
            where="evaluate",
            hint="evaluate=fn, model → accuracy on training or validation data",
        )
    forks = "fork" in multiprocessing.get_all_start_methods()
    if workers > 1 and (not forks or any(p.is_cuda for p in space.model.parameters())):
        why = "are on a GPU" if forks else "cannot be handed to processes on this system"
        raise InputError(
            f"the network and its data {why}",
            where="workers",
            hint="leave it at 1; part=(i, n) divides the work among several runs",
        )
