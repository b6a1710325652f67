"""What a report says beside the figures of each file: how sure they are, what running costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimkit.artifact import content_hash
from slimkit.recipe.proving import (
    PROOF_VERSION,
    Proof,
    file_run,
    input_arrays,
    plain,
    timed_inputs,
)
from slimkit.tasks.evidence import Evidence
from slimkit.tasks.interface import answers_to

if TYPE_CHECKING:
    from slimkit.recipe.workbench import Workbench

__all__ = ["gather_evidence", "with_running_figures"]

_MEMORY_VERSION = 1


def gather_evidence(bench: Workbench, proofs: Mapping[str, Proof]) -> Evidence:
    """Intervals of all variants, and what the task draws; from the cache if it is there.

    Args:
        bench: of the run.
        proofs: variant name → proof, in the order of the report.
    """
    keys = [(name, proof.key) for name, proof in proofs.items()]
    key = content_hash({"version": PROOF_VERSION, "proofs": keys})
    known = bench.note("evidence", key)
    if known is None:
        records = {name: proof.record for name, proof in proofs.items()}
        found = bench.task.evidence(records, bench.splits)
        ends = list(dict.fromkeys([next(iter(proofs)), list(proofs)[-1]]))
        answers = {  # computed while the task reads them
            name: answers_to(file_run(bench, proofs[name].path), bench.splits.test) for name in ends
        }
        drawn = [*found.drawings, *bench.task.drawings(answers, bench.splits)]
        known = {
            "variants": {name: plain(dict(entry)) for name, entry in found.variants.items()},
            "drawings": [plain(dict(drawing)) for drawing in drawn],
        }
        bench.cache.keep("evidence", key, known)
    return Evidence(known["variants"], known["drawings"])


def with_running_figures(
    bench: Workbench,
    proofs: Mapping[str, Proof],
    latency: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[dict[str, Any]]]:
    """Each measured latency with the throughput that follows from it, and with the memory.

    Args:
        bench: of the run; a smoke run measures no memory.
        proofs: variant name → proof.
        latency: variant name → one entry per backend of the recipe.

    Returns:
        The entries with ``images_per_second`` and, where it was measured, ``memory_bytes``.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in latency}
    for place, _ in enumerate(bench.recipe.measure.backends):
        entries = {name: own[place] for name, own in latency.items()}
        memory = _memory(bench, proofs, place)
        for name, entry in entries.items():
            images = 1000 * entry["batch"] / entry["median_ms"]
            more = {} if memory.get(name) is None else {"memory_bytes": memory[name]}
            found[name].append({**entry, "images_per_second": round(images, 2), **more})
    return found


def _memory(bench: Workbench, proofs: Mapping[str, Proof], place: int) -> dict[str, int | None]:
    """Bytes per variant on one backend; files that were measured before are not run again."""
    from slimkit.measure.memory import running_memory

    if bench.smoke or not bench.recipe.measure.memory:
        return {}
    backend = bench.recipe.measure.backends[place]
    settings = {"version": _MEMORY_VERSION, **backend.model_dump(mode="json")}
    keys = {name: content_hash({**settings, "proof": p.key}) for name, p in proofs.items()}
    found = {name: bench.note("memory", key) for name, key in keys.items()}
    missing = {name: proofs[name].path for name, value in found.items() if value is None}
    if missing:
        path = next(iter(missing.values()))
        example = timed_inputs(bench, path, backend.batch)
        measured = running_memory(
            missing,
            backend=backend.name,
            threads=backend.threads,
            batch=backend.batch,
            inputs=None if example is None else input_arrays(example, path),
        )
        for name, value in measured.items():
            found[name] = value
            if value is not None:
                bench.cache.keep("memory", keys[name], value)
    return found
