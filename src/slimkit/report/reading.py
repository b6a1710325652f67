"""Reading ``report.json`` into values that the page, the tables and the pictures share.

A report may miss pieces (no latency was measured, a stage has no history, there is one
variant only); what is missing is ``None`` or empty here and left out of the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from slimkit.artifact import PathLike, read_json
from slimkit.errors import ArtifactError
from slimkit.report import words
from slimkit.report.intervals import Interval, read_intervals
from slimkit.terminal import visible_json

__all__ = ["Latency", "Report", "Score", "StageRun", "Variant", "load_report", "parse_report"]

SCHEMA_VERSION = 1
"""Of ``report.json``; a report of a newer version is refused."""
SCORES = {"accuracy": "accuracy", "map": "mAP", "miou": "mIoU"}
"""Metrics that head a report which does not say what decides: in percent, more is better."""


@dataclass(frozen=True)
class Score:
    """The metric that heads the report, and how it is written.

    Attributes:
        name: among a variant's metrics.
        label: as it is written: accuracy, mAP, mIoU.
        unit: behind the number; differences of percentages are points.
        higher_is_better: whether more of it is won or lost.
        low, high: its interval; None where it is open.
        digits: behind the point.
    """

    name: str
    label: str
    unit: str = "%"
    higher_is_better: bool = True
    low: float | None = 0.0
    high: float | None = 100.0
    digits: int = 2

    @property
    def title(self) -> str:
        """Of a column or an axis: ``mAP, %``; ``RMSE``, of which less is better, says so."""
        unit = f", {self.unit}" if self.unit else ""
        return f"{self.label}{unit}{'' if self.higher_is_better else ' (less is better)'}"

    def plain(self, value: float | None) -> str:
        """The number: ``98.89``."""
        return words.score(value, self.digits)

    def written(self, value: float | None) -> str:
        """The number with its unit: ``98.89 %``."""
        unit = f"{words.NARROW}{self.unit}" if self.unit and value is not None else ""
        return f"{self.plain(value)}{unit}"

    def change(self, difference: float | None) -> str:
        """A difference with its sign: ``−0.19``."""
        return words.points(difference, self.digits)

    def told(self, difference: float | None) -> str:
        """The same in words: ``−0.19 points``, ``+0.031 RMSE``."""
        if difference is None:
            return ""
        return f"{self.change(difference)} {'points' if self.unit == '%' else self.label}"


@dataclass(frozen=True)
class Latency:
    """One measured latency of one file."""

    backend: str
    threads: int
    batch: int
    median_ms: float
    p90_ms: float | None
    busy: str | None
    images_per_second: float | None = None
    memory_bytes: float | None = None

    @property
    def setting(self) -> tuple[str, int, int]:
        """What must agree for two latencies to be comparable."""
        return (self.backend, self.threads, self.batch)

    @property
    def label(self) -> str:
        """``onnxruntime, 1 thread``; the batch is named when it is not 1."""
        threads = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        batch = "" if self.batch == 1 else f", batch {self.batch}"
        return f"{self.backend}, {threads}{batch}"


@dataclass(frozen=True)
class StageRun:
    """One stage of one variant's chain."""

    name: str
    type: str
    seconds: float | None
    cached: bool
    settings: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]
    channels: tuple[Mapping[str, Any], ...]
    measured: Mapping[str, Any]
    rounding: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """One network of the report."""

    name: str
    metrics: Mapping[str, float]
    torch_metrics: Mapping[str, float]
    cost: Mapping[str, float]
    latency: tuple[Latency, ...]
    parity: Mapping[str, Any]
    fusion: Mapping[str, Any]
    files: tuple[tuple[str, str], ...]
    stages: tuple[StageRun, ...]
    warnings: tuple[str, ...]
    samples: int | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    changes: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """What its stages took, whenever they were run; None where it is not known."""
        known = [stage.seconds for stage in self.stages]
        return sum(s for s in known if s is not None) if known and None not in known else None

    def timed(self, setting: tuple[str, int, int] | None) -> Latency | None:
        """What was measured under ``setting``, if anything was."""
        return next((item for item in self.latency if item.setting == setting), None)

    def median_ms(self, setting: tuple[str, int, int] | None) -> float | None:
        """The median latency under ``setting``, if it was measured."""
        found = self.timed(setting)
        return None if found is None else found.median_ms


@dataclass(frozen=True)
class Report:
    """A whole report; the first variant is the baseline, the last the final one."""

    name: str
    variants: tuple[Variant, ...]
    gates: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    seed: int | None
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    smoke: bool
    head: Score
    scores: Mapping[str, Score]
    drawings: tuple[Mapping[str, Any], ...] = ()
    deploy: Mapping[str, Any] = field(default_factory=dict)
    again: str = ""
    files: tuple[tuple[str, str], ...] = ()

    @property
    def baseline(self) -> Variant:
        """The variant that all changes refer to."""
        return self.variants[0]

    @property
    def final(self) -> Variant:
        """The variant that the recipe is about."""
        return self.variants[-1]

    @property
    def metric(self) -> str:
        """Name of the metric that heads the report."""
        return self.head.name

    @property
    def metric_label(self) -> str:
        """The metric as it is written: accuracy, mAP, mIoU."""
        return self.head.label

    def score(self, variant: Variant) -> float | None:
        """The heading metric of ``variant``."""
        return variant.metrics.get(self.metric)

    def score_change(self, variant: Variant) -> float | None:
        """The difference to the baseline, in points where it is in percent."""
        now, before = self.score(variant), self.score(self.baseline)
        return None if now is None or before is None else now - before

    @property
    def latencies(self) -> list[Latency]:
        """One example of each way in which latency was measured, in order of appearance."""
        found: dict[tuple[str, int, int], Latency] = {}
        for variant in self.variants:
            for item in variant.latency:
                found.setdefault(item.setting, item)
        return list(found.values())

    @property
    def setting(self) -> tuple[str, int, int] | None:
        """The way of measuring that the verdict refers to: the first one."""
        return next((item.setting for item in self.latencies), None)

    @property
    def unreliable(self) -> str | None:
        """Why the times that the verdict refers to are not to be trusted, or None."""
        timed = (variant.timed(self.setting) for variant in (self.final, self.baseline))
        return next((item.busy for item in timed if item is not None and item.busy), None)

    @property
    def passed(self) -> bool | None:
        """Whether all gates hold; ``None`` when the recipe has none."""
        return all(bool(gate.get("passed")) for gate in self.gates) if self.gates else None

    def verdict(self) -> str:
        """The whole report in one line: ``4.2× smaller, 3.1× faster, −0.20 points``."""
        final, base = self.final, self.baseline
        if final is base:
            score = self.score(base)
            pieces = [
                "" if score is None else f"{self.head.written(score)} {self.metric_label}",
                words.size(base.cost["bytes"]) if "bytes" in base.cost else "",
            ]
            return ", ".join(piece for piece in pieces if piece) or "one variant"
        setting = self.setting
        difference = self.score_change(final)
        speed = words.factor(final.median_ms(setting), base.median_ms(setting), "faster", "slower")
        pieces = [
            words.factor(final.cost.get("bytes"), base.cost.get("bytes"), "smaller", "larger"),
            f"{speed} (times unreliable)" if speed and self.unreliable else speed,
            self.head.told(difference),
        ]
        return ", ".join(piece for piece in pieces if piece) or "nothing was measured"


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {}
    return {
        str(key): item
        for key, item in value.items()
        if isinstance(item, int | float) and not isinstance(item, bool)
    }


def _rows(value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, Mapping):  # a history with its epochs inside
        value = value.get("epochs")
    return tuple(row for row in value or () if isinstance(row, Mapping))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(text) for text in value or ())


def _files(value: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(value, Mapping):
        return tuple((str(kind), str(path)) for kind, path in value.items())
    return tuple((Path(str(path)).name, str(path)) for path in value or ())


def _latency(entry: Mapping[str, Any]) -> Latency:
    busy = entry.get("busy")
    return Latency(
        backend=str(entry["backend"]),
        threads=int(entry.get("threads", 1)),
        batch=int(entry.get("batch", 1)),
        median_ms=float(entry["median_ms"]),
        p90_ms=entry.get("p90_ms"),
        busy=str(busy) if isinstance(busy, str) else ("the CPU was busy" if busy else None),
        images_per_second=entry.get("images_per_second"),
        memory_bytes=entry.get("memory_bytes"),
    )


def _stage(entry: Mapping[str, Any]) -> StageRun:
    return StageRun(
        name=str(entry["name"]),
        type=str(entry.get("type", "")),
        seconds=entry.get("seconds"),
        cached=bool(entry.get("cached")),
        settings=entry.get("settings") or {},
        history=_rows(entry.get("history")),
        channels=_rows(entry.get("channels")),
        measured=entry.get("measured") or {},
        rounding=entry.get("rounding") or {},
        warnings=_texts(entry.get("warnings")),
    )


def _variant(entry: Mapping[str, Any]) -> Variant:
    evidence = entry.get("evidence") or {}
    samples = evidence.get("samples")
    return Variant(
        name=str(entry["name"]),
        metrics=_numbers(entry.get("metrics")),
        torch_metrics=_numbers(entry.get("torch_metrics")),
        cost=_numbers(entry.get("cost")),
        latency=tuple(_latency(item) for item in entry.get("latency") or ()),
        parity=entry.get("parity") or {},
        fusion=entry.get("fusion") or {},
        files=_files(entry.get("files")),
        stages=tuple(_stage(item) for item in entry.get("stages") or ()),
        warnings=_texts(entry.get("warnings")),
        samples=None if samples is None else int(samples),
        intervals=read_intervals(evidence.get("metrics")),
        changes=read_intervals(evidence.get("change")),
    )


def parse_report(data: Any, *, where: str = "report.json") -> Report:
    """Check and read the contents of a ``report.json``.

    Control characters in its texts are shown, not kept: they end in terminals.

    Args:
        data: the parsed JSON.
        where: the file's name for messages.

    Raises:
        ArtifactError: it is no report, is damaged, or was written by a newer version.
    """
    if not isinstance(data, Mapping) or not data.get("variants"):
        raise ArtifactError("this is not a report: it lists no variants", where=where)
    data = visible_json(dict(data))
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ArtifactError(
            f"the report has schema version {version!r}, this library reads {SCHEMA_VERSION}",
            where=where,
            hint="update slimkit",
        )
    try:
        variants = tuple(_variant(entry) for entry in data["variants"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the report is damaged: {error!r}", where=where) from error
    scores = _scores(data.get("task"))
    return Report(
        name=str(data.get("name") or "Slimkit"),
        variants=variants,
        gates=_rows(data.get("gates")),
        environment=data.get("environment") or {},
        seed=data.get("seed"),
        data=data.get("data") or {},
        recipe=data.get("recipe") or {},
        smoke=bool(data.get("smoke")),
        head=_head(scores, variants),
        scores=scores,
        drawings=_rows(data.get("drawings")),
        deploy=data["deploy"] if isinstance(data.get("deploy"), Mapping) else {},
        again=str(data.get("again") or ""),
        files=_files(data.get("files")),
    )


def _scores(task: Any) -> dict[str, Score]:
    """The metrics of the task, as the report says."""
    rows = _rows(task.get("metrics")) if isinstance(task, Mapping) else ()
    known = [each.name for each in fields(Score)]
    return {
        str(row["name"]): Score(**{key: row[key] for key in known if key in row})
        for row in rows
        if "name" in row and "label" in row
    }


def _head(scores: Mapping[str, Score], variants: Sequence[Variant]) -> Score:
    """What decides: the first that the task names, or what is known of older reports."""
    if scores:
        return next(iter(scores.values()))
    for name, label in SCORES.items():
        if any(name in variant.metrics for variant in variants):
            return Score(name, label)
    found = (name for variant in variants for name in variant.metrics if name != "loss")
    name = next(found, "accuracy")
    return Score(name, name)


def load_report(source: Mapping[str, Any] | PathLike) -> Report:
    """Read a report from its JSON, its file, or the folder of a run.

    Raises:
        ArtifactError: there is no such file, or it is no report.
    """
    if isinstance(source, Mapping):
        return parse_report(source)
    path = Path(source)
    path = path / "report.json" if path.is_dir() else path
    return parse_report(read_json(path), where=str(path))
