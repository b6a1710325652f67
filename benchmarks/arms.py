"""Arms of a benchmark that trains: each finished one is a file, so a run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.tables import machine

__all__ = ["finished_arms", "where"]

Record = dict[str, Any]


def finished_arms(
    folder: Path,
    seeds: Iterable[int],
    arms: Iterable[str],
    run: Callable[[str, int], Record],
    expected: Callable[[Record], Record],
) -> list[Record]:
    """The record of every arm and seed in ``folder/seedN/ARM.json``; those that have none are run.

    A record says which machine it is from.

    Args:
        folder: of the records.
        seeds: each runs every arm.
        arms: names, in the order of running.
        run: of an arm and a seed.
        expected: the settings that a record of an earlier run must have to be used again.
    """
    arms = list(arms)
    records = []
    for seed in seeds:
        for arm in arms:
            file = folder / f"seed{seed}" / f"{arm}.json"
            if file.exists():
                record = json.loads(file.read_text())
                if record["settings"] != expected(record):
                    raise SystemExit(f"{file} has other settings; choose a folder of its own")
            else:
                record = {**run(arm, seed), "machine": machine()}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(record, indent=1))
                print(f"{arm}, seed {seed}: {record['accuracy']:.2f} %", flush=True)
            records.append(record)
    return records


def where(records: Iterable[Record]) -> str:
    """A sentence on the machines that trained the arms; the page may be written on another."""
    by_machine: dict[str, list[str]] = {}
    for record in records:
        by_machine.setdefault(record["machine"], []).append(f"{record['arm']} {record['seed']}")
    shown = [f"{', '.join(arms)} on {name}" for name, arms in by_machine.items()]
    return f"Trained, by arm and seed: {'; '.join(shown)}."
