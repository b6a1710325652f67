"""Saved folders under SIGKILL and under several writers: nothing is lost, nothing is torn.

::

    python -m benchmarks.saving_kills                    # 400 kills, 800 saves by four writers

A process saves a network again and again and is killed at a random moment; then the folder is read.
Four processes save the same folder 200 times each while two others read it. Every save has weights
that tell its number, and plans, so that a mixture of two versions would be seen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.errors import SlimkitError

_LONGEST = 0.15
"""Seconds until a kill at most: a save takes one or two hundredths."""


def network(number: int) -> nn.Module:
    """All weights and biases are the number; half of its channels are pruned."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    sk.apply(model, sk.prune.plan(model, torch.zeros(1, 8), ratio=0.5, round_to=1))
    return filled(model, number)


def whole(folder: Path) -> int | None:
    """The number of the version in a folder; None if it is a mixture."""
    fresh = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    model = sk.load(folder, fresh)
    values = {float(v) for p in model.parameters() for v in p.detach().unique()}
    return int(values.pop()) if len(values) == 1 else None


def filled(model: nn.Module, number: int) -> nn.Module:
    """The network with another number."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(number))
    return model


def _save_forever(model: nn.Module, folder: str, first: int) -> None:
    number = first
    while True:
        sk.save(filled(model, number), folder)
        number += 1


def kills(count: int, seed: int) -> dict[str, int]:
    """Kill a saving process ``count`` times and read what it left."""
    numbers = random.Random(seed)
    found = {"kills": count, "lost": 0, "torn": 0, "older than before": 0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "saved"
        model = network(0)
        sk.save(model, folder)
        latest = 0
        for _ in range(count):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                _save_forever(model, str(folder), latest + 1)
            time.sleep(numbers.uniform(0, _LONGEST))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            try:
                version = whole(folder)
            except SlimkitError:
                found["lost"] += 1
                sk.save(filled(model, latest), folder)
                continue
            if version is None:
                found["torn"] += 1
            elif version < latest:
                found["older than before"] += 1
            else:
                latest = version
        found["versions saved"] = latest
        found["files left over"] = len([p for p in Path(place).iterdir() if p.name != "saved"])
    return found


def _write(folder: str, first: int, count: int) -> None:
    torch.set_num_threads(1)
    model = network(first)
    for number in range(first, first + count):
        sk.save(filled(model, number), folder)


def _read(folder: str, done: Event, results: Any) -> None:
    torch.set_num_threads(1)
    reads = torn = failed = 0
    while not done.is_set():
        try:
            torn += whole(Path(folder)) is None
        except SlimkitError:
            failed += 1
        reads += 1
    results.put((reads, torn, failed))


def writers(each: int, count: int = 4, readers: int = 2) -> dict[str, int]:
    """Several writers and readers of one folder."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "saved")
        sk.save(network(0), folder)
        done, results = context.Event(), context.Queue()
        watching = [
            context.Process(target=_read, args=(folder, done, results)) for _ in range(readers)
        ]
        writing = [
            context.Process(target=_write, args=(folder, 1000 * (n + 1), each))
            for n in range(count)
        ]
        for process in [*watching, *writing]:
            process.start()
        failed_writers = 0
        for process in writing:
            process.join()
            failed_writers += process.exitcode != 0
        done.set()
        seen = [results.get() for _ in watching]
        last = whole(Path(folder))
        return {
            "saves": each * count,
            "failed writers": failed_writers,
            "reads": sum(r for r, _, _ in seen),
            "torn reads": sum(t for _, t, _ in seen),
            "failed reads": sum(f for _, _, f in seen),
            "whole at the end": int(last is not None),
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.saving_kills")
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--saves", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    first = kills(chosen.kills, chosen.seed)
    second = writers(chosen.saves // 4)
    tables = [markdown(tuple(row), [list(row.values())]) for row in (first, second)]
    print("\n\n".join(tables))
    if chosen.kills >= 400 and chosen.saves >= 800:
        write_page(
            "saving_kills",
            "Saved folders, killed and shared",
            f"python -m benchmarks.saving_kills --seed {chosen.seed}",
            ["One process saves and is killed:", tables[0], "Four save, two read:", tables[1]],
        )


if __name__ == "__main__":
    main()
