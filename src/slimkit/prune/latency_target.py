"""``latency=0.4``: prune until the network is that much faster, measured where it will run.

A root finding by regula falsi with bisection, on the part of the MACs that is left.
Pruned copies are exported and timed beside the unpruned network, in turns, so that only the
ratio of the two counts and a machine that is busy or warm slows down both. The search goes
along the MACs: milliseconds fall with them, though neither in proportion nor without steps
(kernels like multiples of 8 or 16 channels). A few points are measured, each where the line
through its neighbours meets the goal; one that does is measured again, longer, and counts only
if it still does.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.errors import ExportError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from slimkit.prune.prune_space import Proposal, PruneSpace
    from slimkit.prune.targets import RemovalTarget

__all__ = ["Bench", "fit_latency"]

_EXPORTS = 10
"""Pruned copies that are exported at most; each costs some seconds."""
_QUICK = (3, 0.25)
"""(Repeats, seconds per network and repeat) of a first look: it only steers the search."""
_SURE = (5, 0.6)
"""The same of a measurement that decides: its median scatters by about 1 % on an idle machine."""
_MARGIN = 0.01
"""Fraction of the goal by which the result is faster, so that a second measurement agrees."""
_BEYOND = 0.05
"""Fraction of the goal by which the result may be faster: beyond, channels are wasted."""
_NARROW = 0.035
"""The same for a first look while there are few points; less than ``_BEYOND``, as it is noisy."""
_PATIENT = 3
"""Points up to which a first look must be within ``_NARROW``; later ``_BEYOND`` will do."""


@dataclass(frozen=True)
class _Point:
    """A pruned copy that was measured.

    Attributes:
        macs: part of the MACs that is left.
        ms: of the unpruned network and of the copy.
        ratio: of the two, 0 … 1.
        sure: measured several times.
    """

    kept: Mapping[str, int]
    macs: float
    ms: tuple[float, float]
    ratio: float
    sure: bool = False


def fit_latency(space: PruneSpace, proposal: Proposal, target: RemovalTarget) -> dict[str, int]:
    """The counts of the family ``proposal`` that are as much faster as asked, and hardly more.

    What was measured of the result is noted in ``space.measured``, from where it gets into the
    plan.

    Args:
        space: with ``measuring``: ``backend``, ``threads``.
        proposal: fraction → wanted counts.
        target: the part of the milliseconds that goes.

    Returns:
        Channels kept by group. Their milliseconds, in the median of five measurements, are
        at most ``1 - fraction`` of the unpruned network's, and where some measured point allows
        it at most 5 % below that.

    Raises:
        PlanError: out of reach; says how far one can go and which layers take the time.
        ExportError: the network cannot be written as ONNX; names the layer or the operator.
        UnknownNameError, MissingDependencyError, BackendError, InputError: of the runtime.
    """
    with _bench(space) as bench:
        point = _Search(space, proposal, bench, 1.0 - target.fraction).run()
        if point is None:
            raise bench.out_of_reach(target)
        space.note(point.kept, bench.facts(point))
        return dict(point.kept)


class _Search:
    """The points on the way from the MACs to the milliseconds."""

    def __init__(self, space: PruneSpace, proposal: Proposal, bench: Bench, goal: float) -> None:
        self.space = space
        self.proposal = proposal
        self.bench = bench
        self.goal = goal
        self.aim = goal * (1 - (_MARGIN + _NARROW) / 2)
        self.points: list[_Point] = []
        self.whole = space.cost().macs

    def run(self) -> _Point | None:
        """The slowest sure point that meets the goal; None if it is out of reach."""
        wanted = self.aim - 0.1 * (1 - self.goal)  # MACs fall a little faster
        kept: dict[str, int] | None = self._counts(wanted)
        while kept is not None and len(self.points) < _EXPORTS:
            self._measured(kept, sure=False)
            while (fit := self._fitting()) is not None:
                if fit.sure:
                    return fit
                self._measured(fit.kept, sure=True)
            kept = self._next()
        # No point fits: the next best is the least that is fast enough, and certainly so.
        for limit in (self.goal * (1 - _MARGIN), self.goal):
            for point in sorted(self.points, key=lambda point: -point.ratio):
                if point.ratio <= limit:
                    certain = point if point.sure else self._measured(point.kept, sure=True)
                    if certain.ratio <= limit:
                        return certain
        return None

    def _fitting(self) -> _Point | None:
        """The slowest point that meets the goal and goes hardly beyond."""
        few = len(self.points) <= _PATIENT
        fitting = [
            point
            for point in self.points
            if 1 - (_NARROW if few and not point.sure else _BEYOND)
            <= point.ratio / self.goal
            <= 1 - _MARGIN
        ]
        return max(fitting, key=lambda point: point.ratio, default=None)

    def _counts(self, macs: float) -> dict[str, int]:
        """The counts that leave this part of the MACs, or the fewest allowed."""
        kept = self.space.fit_cost(
            self.proposal, lambda counts: self.space.cost(counts).macs, macs * self.whole
        )
        return self.space.fewest() if kept is None else kept

    def _measured(self, kept: Mapping[str, int], *, sure: bool) -> _Point:
        ms = self.bench(kept, *(_SURE if sure else _QUICK))
        ratio = statistics.median(after / before for before, after in ms)
        point = _Point(
            kept=kept,
            macs=self.space.cost(kept).macs / self.whole,
            ms=(statistics.median(b for b, _ in ms), statistics.median(a for _, a in ms)),
            ratio=ratio,
            sure=sure,
        )
        self.points = [p for p in self.points if p.kept != kept] + [point]
        self.bench.tell(point)
        return point

    def _next(self) -> dict[str, int] | None:
        """Where to measure next; None if there is nothing new to learn."""
        ordered = sorted(self.points, key=lambda point: -point.macs)
        slow: tuple[float, float] = (1.0, 1.0)  # MACs and milliseconds of the unpruned network
        for point in ordered:
            if point.ratio <= self.aim:
                return self._between(slow, (point.macs, point.ratio))
            slow = (point.macs, point.ratio)
        return self._beyond(slow)

    def _between(
        self, slow: tuple[float, float], fast: tuple[float, float]
    ) -> dict[str, int] | None:
        """Regula falsi: where the line between two points meets the goal; else bisection."""
        gap = slow[0] - fast[0]
        part = (self.aim - fast[1]) / max(slow[1] - fast[1], 1e-9)
        for step in (min(max(part, 0.05), 0.95), 0.5):
            kept = self._counts(fast[0] + step * gap)
            if all(kept != point.kept for point in self.points) and kept != self.space.whole():
                return kept
        return None

    def _beyond(self, last: tuple[float, float]) -> dict[str, int] | None:
        """Further down the line from the unpruned network; at the end the fewest channels."""
        slope = (1 - last[1]) / max(1 - last[0], 1e-9)
        step = (last[1] - self.aim) / slope if slope > 0.1 else last[0]
        kept = self._counts(last[0] - min(max(step, 0.02), 0.5 * last[0] + 0.02))
        if all(kept != point.kept for point in self.points):
            return kept
        kept = self.space.fewest()
        return kept if all(kept != point.kept for point in self.points) else None


class Bench:
    """Times pruned copies beside the unpruned network.

    Args:
        space: whose network and settings these are.
        folder: for the exported files.
        show: is given a line of text after each measurement.
    """

    def __init__(self, space: PruneSpace, folder: Path, show: Callable[[str], None]) -> None:
        from slimkit.runtime.sessions import BACKENDS

        self.space = space
        self.folder = folder
        self.show = show
        self.backend = str(space.measuring.get("backend", "onnxruntime"))
        self.threads = int(space.measuring.get("threads", 1))
        if self.backend != "torch":
            BACKENDS.get(self.backend, where="backend")
        self.busy: str | None = None
        self._ready: dict[tuple[int, ...], Any] = {}
        self._whole = space.whole()

    def __call__(
        self, kept: Mapping[str, int], repeats: int, seconds: float
    ) -> list[tuple[float, float]]:
        """Milliseconds of the unpruned network and of the copy, once per repeat."""
        from slimkit.measure.latency import benchmark_interleaved

        models = {"before": self._runnable(self._whole), "after": self._runnable(kept)}
        found = []
        for _ in range(repeats):
            timings = benchmark_interleaved(
                models,
                backend=self.backend,
                threads=self.threads,
                inputs=self.space.inputs,
                seconds=seconds,
            )
            self.busy = timings["after"].busy
            found.append((timings["before"].median_ms, timings["after"].median_ms))
        return found

    def tell(self, point: _Point) -> None:
        """Show a measurement."""
        checked = f", median of {_SURE[0]}" if point.sure else ""
        self.show(
            f"latency  {point.ms[0]:.3g} → {point.ms[1]:.3g} ms "
            f"({_percent(point.ratio)} %{checked}) with {_percent(point.macs)} % MACs"
        )

    def facts(self, point: _Point) -> dict[str, Any]:
        """Settings for the plan: measured milliseconds, backend, threads, warnings."""
        from slimkit.measure.layer_latency import unrewarded

        found: dict[str, Any] = {
            "backend": self.backend,
            "threads": self.threads,
            "measured_ms": [round(ms, 4) for ms in point.ms],
        }
        warning = unrewarded(
            (self._file(self._whole), self._file(point.kept)),
            macs=(1.0, point.macs),
            ms=(1.0, point.ratio),
            backend=self.backend,
            threads=self.threads,
            inputs=self._feeds(),
        )
        warnings = [text for text in (warning, self.busy) if text]
        return {**found, "warnings": warnings} if warnings else found

    def out_of_reach(self, target: RemovalTarget) -> PlanError:
        """The error that says how far one can go and which layers take the time that is left."""
        kept = self.space.fewest()
        before, after = sorted(self(kept, *_SURE), key=lambda ms: ms[1] / ms[0])[_SURE[0] // 2]
        gone = 1 - after / before
        if gone > target.fraction:
            return PlanError(
                f"{target}: no network was fast enough twice in a row, the times vary too much",
                where="latency",
                hint=self.busy or "measure on a machine that does nothing else",
            )
        return PlanError(
            f"{target} is out of reach: at most {gone:.3f} can go "
            f"({before:.3g} → {after:.3g} ms in {self.backend}), limited by {self._slowest(kept)}",
            where="latency",
            hint="lower round_to or min_channels, ignore fewer layers, or ask for less",
        )

    def _slowest(self, kept: Mapping[str, int]) -> str:
        file = self._file(kept)
        if file is None or self.backend != "onnxruntime":
            return "what cannot be pruned"
        from slimkit.measure.layer_latency import layer_times

        layers = layer_times(file, threads=self.threads, inputs=self._feeds()).values()
        worst = sorted(layers, key=lambda layer: -layer.ms)[:3]
        return ", ".join(
            f"{layer.name} ({' '.join(filter(None, (layer.type, layer.shape)))}: {layer.ms:.3g} ms)"
            for layer in worst
        )

    def _feeds(self) -> list[Any]:
        return [tensor.detach().cpu().numpy() for tensor in self.space.inputs.tensors()]

    def _file(self, kept: Mapping[str, int]) -> Path | None:
        found = self._ready.get(self.space.key(kept))
        return found if isinstance(found, Path) else None

    def _runnable(self, kept: Mapping[str, int]) -> Path | nn.Module:
        """What the backend takes: a file, or for torch the network itself."""
        key = self.space.key(kept)
        if key not in self._ready:
            model = self.space.model if kept == self._whole else self.space.pruned(kept)
            self._ready[key] = model if self.backend == "torch" else self._exported(model)
        runnable: Path | nn.Module = self._ready[key]
        return runnable

    def _exported(self, model: nn.Module) -> Path:
        from slimkit.runtime.exporting import export

        path = self.folder / f"{len(self._ready)}.onnx"
        deployed = self.space.measuring.get("deployed")
        try:
            model = model if deployed is None else deployed(model)
            export(model, path, self.space.inputs, dynamic_batch=False)
        except ExportError as error:
            layer = _failing_layer(error, model)
            inside = f"in {layer}, " if layer else ""
            raise ExportError(
                f"latency is measured in {self.backend}, and the network cannot be exported: "
                f"{inside}{error.message}",
                where="latency",
                hint=error.hint or 'macs=… needs no export, nor does backend="torch"',
            ) from error
        return path


def _percent(ratio: float) -> str:
    """A change in percent, with its sign."""
    change = round(100 * (ratio - 1))
    return f"{'−' if change < 0 else '+'}{abs(change)}"


def _failing_layer(error: BaseException, model: nn.Module) -> str | None:
    """The innermost module of ``model`` that was running when the cause of ``error`` came up."""
    names = {id(module): name for name, module in model.named_modules()}
    found: str | None = None
    cause: BaseException | None = error.__cause__
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            found = names.get(id(trace.tb_frame.f_locals.get("self"))) or found
            trace = trace.tb_next
        cause = cause.__cause__
    return found


@contextmanager
def _bench(space: PruneSpace) -> Iterator[Bench]:
    """A bench with a folder for its files and a line of progress on standard error."""
    from rich.console import Console

    console = Console(stderr=True)

    def show(line: str) -> None:
        if space.progress:
            console.print(line, highlight=False, soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="slimkit-latency-") as folder:
        yield Bench(space, Path(folder), show)
