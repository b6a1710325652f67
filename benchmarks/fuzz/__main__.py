"""Fuzzing: damaged files, odd recipes and bad arguments, counted by what came of them.

::

    python -m benchmarks.fuzz                  # 3,600 cases, some minutes
    python -m benchmarks.fuzz --cases 300 --seed 5 --kinds files

Writes ``docs/benchmarks/fuzz.md`` when all kinds ran, and ends with 1 if the limits are exceeded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks.fuzz import arguments, files, recipes
from benchmarks.fuzz.running import OUTCOMES, Tally, run
from benchmarks.tables import markdown, write_page

LIMIT_RAW = 0.005
"""Share of cases that may end in an exception that is not ours."""
_KINDS = ("files", "recipes", "arguments")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuzz")
    parser.add_argument("--cases", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS)
    chosen = parser.parse_args()
    each = chosen.cases // len(chosen.kinds)
    tallies: dict[str, Tally] = {}
    started = time.perf_counter()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        made = {
            "files": lambda: files.cases(chosen.seed, each, place),
            "recipes": lambda: recipes.cases(chosen.seed, each, place),
            "arguments": lambda: arguments.cases(chosen.seed, each),
        }
        for kind in chosen.kinds:
            tallies[kind] = run(made[kind]())
            _tell(kind, tallies[kind])
    seconds = time.perf_counter() - started
    if tuple(chosen.kinds) == _KINDS:
        _write(
            tallies,
            f"python -m benchmarks.fuzz --cases {chosen.cases} --seed {chosen.seed}",
            seconds,
        )
    sys.exit(0 if _within(tallies) else 1)


def _tell(kind: str, tally: Tally) -> None:
    counts = ", ".join(f"{name} {tally.counts[name]}" for name in OUTCOMES)
    print(f"{kind}: {tally.cases} cases: {counts}")
    for name, outcome, reason in tally.told:
        print(f"  {outcome}: {name}: {reason}")


def _within(tallies: dict[str, Tally]) -> bool:
    total = sum(tally.cases for tally in tallies.values())
    bad = sum(t.counts[name] for t in tallies.values() for name in ("wrong", "hang", "lost"))
    return not bad and sum(t.counts["raw"] for t in tallies.values()) <= LIMIT_RAW * total


def _write(tallies: dict[str, Tally], command: str, seconds: float) -> None:
    header = ("what", "cases", *OUTCOMES)
    rows: list[list[object]] = [
        [kind, tally.cases, *(tally.counts[name] for name in OUTCOMES)]
        for kind, tally in tallies.items()
    ]
    rows.append(
        [
            "all",
            sum(tally.cases for tally in tallies.values()),
            *(sum(t.counts[name] for t in tallies.values()) for name in OUTCOMES),
        ]
    )
    kinds = ", ".join(f"{kind.name}{' (sealed)' if kind.sealed else ''}" for kind in files.KINDS)
    write_page(
        "fuzz",
        "Fuzzing",
        command,
        [
            f"{seconds / 60:.0f} minutes.",
            markdown(header, rows),
            "*right*: done, with the result of the undamaged input where it carries a checksum; "
            "*typed*: a SlimkitError; *raw*: another exception; *wrong*: a changed file was "
            "accepted and gave another result; *lost*: a file that nobody damaged was changed.",
            f"Files: {kinds}.",
            "\n".join(
                f"- {outcome}: {name}: {reason}"
                for t in tallies.values()
                for name, outcome, reason in t.told
            ),
        ],
    )


if __name__ == "__main__":
    main()
