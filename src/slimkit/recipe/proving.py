"""What a variant is worth: exported, run in the runtime, compared with torch, counted.

The test split is read here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkit.artifact import content_hash, write_text
from slimkit.measure.profiling import profile
from slimkit.plan import save
from slimkit.recipe.chains import Chain
from slimkit.recipe.gains import without_gain
from slimkit.recipe.keys import file_hash
from slimkit.recipe.schema.places import at
from slimkit.runtime import export, open_session
from slimkit.runtime.onnx_files import file_bytes, model_files
from slimkit.runtime.structure import named_feeds
from slimkit.tasks.interface import answers_to
from slimkit.tasks.running import Run, session_run
from slimkit.tasks.splits import first_batches
from slimkit.train.history import finite_metrics

if TYPE_CHECKING:
    from torch import nn

    from slimkit.inputs import Inputs
    from slimkit.recipe.workbench import Workbench

__all__ = [
    "PROOF_VERSION",
    "Proof",
    "file_run",
    "input_arrays",
    "measure_latency",
    "plain",
    "prove",
    "speed_warnings",
    "timed_inputs",
]

PROOF_VERSION = 2


@dataclass(frozen=True)
class Proof:
    """A variant's exported file and everything that was found out about it but its latency.

    Attributes:
        record: what the task kept of the answers to single samples, for a report.
    """

    path: Path
    metrics: dict[str, float]
    torch_metrics: dict[str, float]
    cost: dict[str, int]
    parity: dict[str, Any]
    fusion: dict[str, Any]
    record: Any
    cached: bool
    key: str


def prove(bench: Workbench, chain: Chain, folder: Path) -> Proof:
    """Write ``model/``, ``model.onnx`` and ``predict.py`` into ``folder``; test the file.

    Args:
        bench: of the run.
        chain: the variant's stages.
        folder: of the variant, made if need be.

    Raises:
        TrainingError: a metric of the network or of its file is not finite.
        ExportError, BackendError: the network cannot be exported or run.
        ArtifactError: not writable.
    """
    model = bench.result(chain).eval()
    save(model, folder / "model")
    write_text(folder / "predict.py", bench.task.predict_script(bench.splits))
    path = _exported(bench, chain, model, folder / "model.onnx")
    costs = profile(model, bench.example_inputs)
    cost = {
        "params": costs.params,
        "nonzero_params": costs.nonzero_params,
        "macs": costs.macs,
        "bops": costs.bops,
        "weight_bytes": costs.bytes,
        "bytes": file_bytes(path),
    }
    key = _proof_key(bench, chain, path)
    known = bench.note("proofs", key)
    if known is None:
        with at(f"variants.{folder.name}"):
            known = _test(bench, model, path)
        bench.cache.keep("proofs", key, known)
        cached = False
    else:
        cached = True
    return Proof(path=path, cost=cost, cached=cached, key=key, **known)


def measure_latency(bench: Workbench, paths: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Latency of all variants on every backend of the recipe, taken in turns.

    Returns:
        Variant name → one entry per backend, in the recipe's order.
    """
    from slimkit.measure.latency import benchmark_interleaved

    settings = bench.recipe.measure
    seconds = min(settings.seconds, 0.05) if bench.smoke else settings.seconds
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for backend in settings.backends:
        timings = benchmark_interleaved(
            paths,
            backend=backend.name,
            threads=backend.threads,
            batch=backend.batch,
            inputs=timed_inputs(bench, next(iter(paths.values())), backend.batch),
            seconds=seconds,
        )
        for name, timing in timings.items():
            found[name].append(timing.to_json())
    return found


def timed_inputs(bench: Workbench, path: Path, batch: int) -> Inputs | None:
    """Samples to time a file on; None where random numbers of its shapes are as good."""
    inputs = open_session(path).inputs
    floats = all(spec.dtype.startswith("float") for spec in inputs)
    if floats and all(None not in spec.shape[1:] for spec in inputs):
        return None
    return bench.task.prepare(bench.task.example_inputs(bench.splits, batch))


def file_run(bench: Workbench, path: Path) -> Run:
    """A variant's file as a function from the model's inputs to the model's outputs."""
    backend = bench.recipe.measure.backends[0].name
    session = session_run(open_session(path, backend=backend, threads=_threads()))
    task = bench.task

    def run(inputs: Inputs) -> Any:
        return task.complete(session(task.prepare(inputs)), inputs)

    return run


def speed_warnings(
    bench: Workbench,
    proofs: Mapping[str, Proof],
    latency: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[str]]:
    """Where stages gained nothing, or MACs were lost against the first one and no milliseconds.

    Args:
        bench: of the run; a smoke run measures nothing that means anything.
        proofs: variant name → proof.
        latency: of :func:`measure_latency`.

    Returns:
        Variant name → warnings that name the layers; a list for every variant.
    """
    from slimkit.measure.layer_latency import unrewarded

    found: dict[str, list[str]] = {name: [] for name in proofs}
    if not bench.smoke:
        files = {name: proof.path for name, proof in proofs.items()}
        found |= without_gain(bench.recipe, latency, files)
    first, *others = proofs
    for name in [] if bench.smoke else others:
        for before, after in zip(latency[first], latency[name], strict=True):
            example = timed_inputs(bench, proofs[name].path, after["batch"])
            text = unrewarded(
                (proofs[first].path, proofs[name].path),
                macs=(proofs[first].cost["macs"], proofs[name].cost["macs"]),
                ms=(before["median_ms"], after["median_ms"]),
                backend=after["backend"],
                threads=after["threads"],
                batch=after["batch"],
                inputs=None if example is None else input_arrays(example, proofs[name].path),
            )
            if text is not None:
                found[name].append(text)
    return found


def _exported(bench: Workbench, chain: Chain, model: nn.Module, path: Path) -> Path:
    """Export the network, or take the file from the cache."""
    task, splits = bench.task, bench.splits
    metadata = {
        **task.metadata(splits),
        "slimkit.recipe": bench.recipe.name,
        "slimkit.stages": " ".join(chain),
    }
    # data beside a file is found by its name: each network has a folder of its own
    key = bench.keys.export(chain, metadata)
    name = f"{key}/model.onnx"
    if not bench.cache.fetch_file(
        "exports", name, path, lambda problem: bench.damaged("exports", key, problem)
    ):
        example = task.prepare(bench.example_inputs)
        options = task.export_options(splits)
        export(task.exported(model, splits), path, example, metadata=metadata, **options)
        bench.cache.keep_file("exports", name, path)
    return path


def _proof_key(bench: Workbench, chain: Chain, path: Path) -> str:
    """The tests of a file depend on its bytes, the network, the test images and the runtimes."""
    from importlib.metadata import version

    backend = bench.recipe.measure.backends[0].name
    return content_hash(
        {
            "version": PROOF_VERSION,
            "files": [file_hash(str(file)) for file in model_files(path)],
            "network": bench.keys.export(chain, {}),
            "task": [bench.task.model_dump(mode="json"), bench.task.version],
            "data": bench.splits.fingerprint,
            "batch": bench.splits.test.batch_size,
            "backend": [backend, version(backend)],
            "parity_batches": bench.recipe.measure.parity_batches,
        }
    )


def _test(bench: Workbench, model: nn.Module, path: Path) -> dict[str, Any]:
    from slimkit.runtime import fusion_report, parity, parity_per_layer

    settings = bench.recipe.measure
    backend = settings.backends[0].name
    task, test = bench.task, bench.splits.test

    def calls(count: int) -> Iterator[Inputs]:
        """Of the file, with the first test batches."""
        return (task.prepare(batch.inputs) for batch in first_batches(test, count))

    exported = task.exported(model, bench.splits)
    facts = parity(exported, path, calls(settings.parity_batches), backend=backend).to_json()
    if backend == "onnxruntime":  # each integer kernel against exact arithmetic
        layers = parity_per_layer(path, calls(1))
        if layers.layers:
            facts["layers"] = {
                "count": len(layers.layers),
                "within_one": layers.within_one,
                "exact": layers.exact,
            }
    examined = task.examine(answers_to(file_run(bench, path), test), bench.splits)
    return {
        "metrics": _rounded(examined.scores, f"of the file on {backend}"),
        "torch_metrics": _rounded(task.evaluate(model, test), "by torch"),
        "parity": plain(facts),
        "fusion": plain(fusion_report(path).to_json()),
        "record": plain(examined.record),
    }


def input_arrays(inputs: Inputs, path: Path) -> list[Any]:
    """In the order of the file's inputs."""
    names = open_session(path).input_names
    feeds = named_feeds(inputs, names)
    return [feeds[name] for name in names] if isinstance(feeds, dict) else feeds


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _rounded(scores: Mapping[str, float], how: str) -> dict[str, float]:
    found = finite_metrics(scores, f"on the test split, {how},")
    return {name: round(value, 4) for name, value in found.items()}


def plain(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
