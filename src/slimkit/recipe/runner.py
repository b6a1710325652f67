"""``slimkit run``: a recipe from its first stage to its report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from slimkit.artifact import UNFINISHED, PathLike, write_json, write_text
from slimkit.errors import ArtifactError, GateError
from slimkit.recipe.cache import Cache
from slimkit.recipe.chains import Chain
from slimkit.recipe.deploy_choice import choose_variant
from slimkit.recipe.evidence import gather_evidence, with_running_figures
from slimkit.recipe.loading import dump_recipe
from slimkit.recipe.needs import untrained
from slimkit.recipe.preview import Preview, preview_recipe, time_left
from slimkit.recipe.proving import Proof, measure_latency, prove, speed_warnings
from slimkit.recipe.schema.gates import check_gates, missed_text
from slimkit.recipe.schema.links import part_of, stage_of
from slimkit.recipe.schema.recipe import Recipe
from slimkit.recipe.stages.interface import ignore_event
from slimkit.recipe.workbench import Workbench
from slimkit.report.reading import SCHEMA_VERSION

__all__ = ["preview_run", "run_recipe"]

LONG_STAGE = 60.0
"""Seconds, from which on somebody who waits wants to know how long the others take."""

Listener = Callable[[Mapping[str, Any]], None]


def run_recipe(
    recipe: Recipe,
    out: PathLike | None = None,
    *,
    smoke: bool = False,
    progress: bool = True,
    cache: PathLike | None = None,
    listener: Listener = ignore_event,
) -> dict[str, Any]:
    """Run every variant of ``recipe``, measure them beside each other, write the report.

    Stages that are in the cache are not run again; a run that was interrupted continues where
    it was. What is written: ``report.json``, ``report.html``, ``recipe.yaml`` (resolved),
    ``log.jsonl`` and ``variants/NAME/`` with ``model/``, ``model.onnx`` and ``predict.py``.

    Args:
        recipe: from :func:`slimkit.recipe.load_recipe`.
        out: output folder; ``runs/NAME`` by default.
        smoke: two steps per stage on synthetic data, with a cache of its own in ``out``.
        progress: show progress bars.
        cache: folder of the stage cache; see :func:`slimkit.recipe.cache.default_cache`.
        listener: is called with every event that goes to the log.

    Returns:
        The contents of ``report.json``.

    Raises:
        GateError: the result misses a gate of ``require:``; everything is written.
        SlimkitError: bad input.
    """
    folder = Path(out) if out is not None else Path("runs") / recipe.name
    store = Cache(folder / "cache" if smoke else cache)
    with _Log(folder / "log.jsonl", listener) as log, _threads(recipe.threads):
        log({"event": "run", "recipe": recipe.name, "seed": recipe.seed, "smoke": smoke})
        bench = Workbench(
            recipe,
            store,
            smoke=smoke,
            progress=progress,
            emit=log,
            log_dir=folder / "tensorboard",
        )
        _check_early(bench)
        log.open()  # nothing was written so far: a mistake leaves nothing behind
        random_weights = None if smoke else untrained(recipe)
        if random_weights is not None:
            log({"event": "warning", "message": random_weights})
        store.prepare()
        _sweep(folder)
        report = _report(bench, folder, log)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "report.json", report)
        _write_page(folder)
        log({"event": "done", "report": str(folder / "report.json")})
        missed = missed_text(report["gates"])
        if missed and not smoke:
            log({"event": "gates", "missed": missed})
            raise GateError(missed, where="require")
    return report


def preview_run(recipe: Recipe, *, smoke: bool = False, cache: PathLike | None = None) -> Preview:
    """What :func:`run_recipe` would do: sizes, what is cached, and how long the rest takes."""
    with _threads(recipe.threads):
        bench = Workbench(recipe, Cache(cache), smoke=smoke)
        bench.check_models()
        return preview_recipe(bench)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """PyTorch with so many threads inside of an operator, and afterwards as it was."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _check_early(bench: Workbench) -> None:
    """Find mistakes that lie late in a chain before the hours of training in front of them."""
    bench.check_models()
    for chain in bench.recipe.variants.values():
        if chain and not bench.is_cached(chain):
            bench.preview(chain)


def _sweep(folder: Path) -> None:
    """Remove what a run that was killed while writing left in ``folder``."""
    files = [f".{name}{UNFINISHED}*" for name in ("report", "recipe", "log")]
    for pattern in (*files, "variants/*/.model.*", f"variants/*/.predict{UNFINISHED}*"):
        for remains in folder.glob(pattern):
            if remains.is_dir():
                shutil.rmtree(remains, ignore_errors=True)
            else:
                remains.unlink(missing_ok=True)


def _report(bench: Workbench, folder: Path, log: Listener) -> dict[str, Any]:
    recipe = bench.recipe
    proofs: dict[str, Proof] = {}
    stages: dict[str, list[dict[str, Any]]] = {}
    for name, chain in recipe.variants.items():
        log({"event": "variant", "variant": name, "chain": list(chain)})
        stages[name] = []
        for end in range(len(chain)):
            known = bench.ran(chain[: end + 1])
            stages[name].append(_stage(bench, chain[: end + 1]))
            if known is None:
                _tell_time_left(bench, chain[: end + 1], log)
    for name, chain in recipe.variants.items():
        proofs[name] = prove(bench, chain, folder / "variants" / name)
        told = {**proofs[name].metrics, **proofs[name].cost}
        score = bench.task.metric.written(proofs[name].metrics)
        log({"event": "proof", "variant": name, "score": score, **told})
    started = time.perf_counter()
    latency = measure_latency(bench, {name: proof.path for name, proof in proofs.items()})
    log({"event": "latency", "seconds": time.perf_counter() - started})
    latency = with_running_figures(bench, proofs, latency)
    evidence = gather_evidence(bench, proofs)
    warnings = speed_warnings(bench, proofs, latency)
    for name, texts in warnings.items():
        for text in texts:
            log({"event": "warning", "variant": name, "message": text})
    variants = [
        {
            "name": name,
            "metrics": proof.metrics,
            "torch_metrics": proof.torch_metrics,
            "cost": proof.cost,
            "latency": latency[name],
            "evidence": evidence.variants.get(name, {}),
            "warnings": warnings[name],
            "parity": proof.parity,
            "fusion": proof.fusion,
            "files": {
                "model": f"variants/{name}/model",
                "onnx": f"variants/{name}/model.onnx",
                "predict": f"variants/{name}/predict.py",
            },
            "stages": stages[name],
        }
        for name, proof in proofs.items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": recipe.name,
        "environment": _environment(),
        "seed": recipe.seed,
        "smoke": bench.smoke,
        "task": {
            "type": bench.task.type,
            "metrics": [metric.to_json() for metric in bench.task.metrics],
        },
        "data": bench.data_facts(),
        "recipe": recipe.model_dump(mode="json"),
        "variants": variants,
        "drawings": list(evidence.drawings),
        "gates": check_gates(recipe.require, variants[0], variants[-1], bench.task.metric),
        "deploy": {}
        if bench.smoke
        else choose_variant(variants, recipe.require, bench.task.metric),
        "again": "slimkit run recipe.yaml --out again" + (" --smoke" if bench.smoke else ""),
        "files": {"recipe": "recipe.yaml", "numbers": "report.json", "log": "log.jsonl"},
    }


def _tell_time_left(bench: Workbench, chain: Chain, log: Listener) -> None:
    """After a stage that took long: what is left, by the speed so far."""
    record = bench.record(chain)
    if record.cached or record.seconds < LONG_STAGE:
        return
    count, seconds = time_left(bench)
    if count and seconds is not None:
        log({"event": "left", "stages": count, "seconds": seconds})


def _stage(bench: Workbench, chain: Chain) -> dict[str, Any]:
    record = bench.record(chain)
    settings = bench.recipe.model_dump(mode="json")["stages"][stage_of(chain[-1])]
    extra = dict(record.extra)
    if (part := part_of(chain[-1])) is not None:
        extra |= extra.pop("models", {}).get(part, {})
    return {
        "name": chain[-1],
        "type": settings["type"],
        "key": record.key,
        "seconds": round(record.seconds, 3),
        "cached": record.cached,
        "settings": settings,
        **extra,
    }


def _environment() -> dict[str, Any]:
    from slimkit.runtime.surroundings import environment

    return environment()


def _write_page(folder: Path) -> None:
    from slimkit.report import write_report

    write_report(folder)


class _Log:
    """``log.jsonl``: one event a line, with its time; a resumed run appends.

    Events that come before :meth:`open` are kept and written then.
    """

    def __init__(self, path: Path, listener: Listener) -> None:
        self.path = path
        self.listener = listener
        self._file: IO[str] | None = None
        self._early: list[str] = []

    def open(self) -> None:
        """Begin to write.

        Raises:
            ArtifactError: the folder is not writable.
        """
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._file.writelines(self._early)
            self._file.flush()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **event}, default=str) + "\n"
        if self._file is None:
            self._early.append(line)
        else:
            with self._writing():
                self._file.write(line)
                self._file.flush()
        self.listener(event)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"cannot write: {error.strerror or error}",
                where=str(self.path),
                hint="choose another folder with --out",
            ) from error
