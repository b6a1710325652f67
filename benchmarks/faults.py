"""Outcomes of fault scripts: short programs that each show what once went wrong.

::

    python -m benchmarks.faults ../shared/faults
    python -m benchmarks.faults ../shared/faults --record FILE   # outcomes alone, for later pages

Each script of the folder runs in a process of its own, with one thread and a time limit. What it
prints is judged here: right is the right value, or one typed error where that is the answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import slimkit.errors
from benchmarks.tables import PAGES, ROOT, markdown, write_page
from slimkit.artifact import write_json

TYPED = frozenset(name for name in slimkit.errors.__all__ if name.endswith("Error"))
"""Names of the errors that a user may meet."""
BEFORE = PAGES / "records" / "faults_before.json"
"""Outcomes of the revision that the scripts were written against."""
_SHOWN = 150
"""Characters of a line in the table."""

Judge = Callable[["Output"], str]
"""Reads what a script printed and says what is wrong with it; nothing if it is right."""


@dataclass(frozen=True)
class Output:
    """What a script left.

    Attributes:
        text: all of its standard output.
        failure: the last line of a traceback (``"slimkit.errors.DataError: …"``), if it ended so.
    """

    text: str
    failure: str = ""

    @property
    def lines(self) -> list[str]:
        """What is worth reading, the failure last."""
        return [line for line in (*self.text.splitlines(), self.failure) if line.strip()]

    @property
    def typed(self) -> bool:
        """Whether an error of Slimkit ended the script."""
        return self.failure.partition(":")[0].rpartition(".")[2] in TYPED

    def numbers(self, pattern: str) -> list[float]:
        """The groups of all matches, as numbers."""
        number = r"(-?[\d.]+(?:e[+-]?\d+)?|nan)"
        found = re.findall(pattern.replace("#", number), self.text)
        return [float(one) for match in found for one in ([match] if type(match) is str else match)]


def wrong(broken: bool, reason: str) -> str:
    """``reason`` if something is broken."""
    return reason if broken else ""


def no_raw(out: Output) -> str:
    """Scripts that print RAW themselves where an error comes from inside."""
    raw = [line for line in out.lines if " RAW " in line or line.startswith("RAW ")]
    return wrong(bool(raw), f"{len(raw)} raw errors")


def every(*expected: str) -> Judge:
    """All of these texts are printed."""

    def judge(out: Output) -> str:
        missing = [text for text in expected if text not in out.text]
        return wrong(bool(missing), f"not printed: {', '.join(missing)}")

    return judge


def at_most(pattern: str, limit: float, what: str) -> Judge:
    """Every number at ``#`` in the pattern is at most ``limit``; there must be one."""

    def judge(out: Output) -> str:
        found = out.numbers(pattern)
        return wrong(not found or not max(found) <= limit, what)

    return judge


def aux_head(out: Output) -> str:
    """The recovery's forward must run; nothing that the head reads may be another size."""
    return wrong("training forward:" in out.text, "the training forward fails")


def averaged(out: Output) -> str:
    """As many zeros after the weight average as in the mask."""
    asked, found = out.numbers(r"wanted # zeros after fit #")
    return wrong(abs(asked - found) > 1e-6, f"{found:.0%} zeros instead of {asked:.0%}")


def quantizers(out: Output) -> str:
    """Each network got quantizers."""
    counts = out.numbers(r"quantizers: #")
    return wrong(0.0 in counts, f"{counts.count(0.0)} networks without quantizers, silently")


def cached_grid(out: Output) -> str:
    """Scores are near what they were (an 8-bit step of the boxes is 4)."""
    pairs = re.findall(r"scores \[(.*?)\] -> \[(.*?)\]", out.text)
    shift = [
        abs(float(a) - float(b))
        for before, after in pairs
        for a, b in zip(before.split(","), after.split(","), strict=True)
    ]
    return wrong(not shift or max(shift) > 0.02, "scores have the scale of the boxes")


def names_of_inputs(out: Output) -> str:
    """The file answers as the network, and its inputs have the forward's names."""
    known = all(n in out.text for n in ("'input_ids'", "'attention_mask'", "'token_type_ids'"))
    difference = at_most(r"file vs network: #", 1e-4, "the file answers something else")(out)
    return difference or wrong(not known, "the int8 file's inputs have other names")


def damaged(out: Output) -> str:
    """Typed errors for all, and the network unchanged."""
    applied = re.findall(r"apply: (\w+)", out.text)
    good = all(name in TYPED for name in applied) and "network as before" in out.text
    return no_raw(out) or wrong(not good or "read outside" in out.text, "read or changed in part")


def late_gradient(out: Output) -> str:
    """Both optimizers run."""
    return every("adamw ok", "sgd ok")(out)


def images_unsplit(out: Output) -> str:
    """Ranges are those of an observer that never splits a batch."""
    found = re.findall(r"\{.*?\}", out.text)
    return wrong(len(found) != 2 or found[0] != found[1], "ranges of single channels")


def lsq_reload(out: Output) -> str:
    """A loaded network answers the same, and scales were observed."""
    difference, size = out.numbers(r"differ by # of #")
    same = difference <= 1e-5 * size
    return wrong(not same, "another network after load") or wrong(
        "[1.0, 1.0" in out.text, "scales of activations are 1.0"
    )


def masked_weights(out: Output) -> str:
    """Outputs keep their size, and what the plan counts is what is left."""
    shapes = re.findall(r"output (\(.*?\)) -> (\(.*?\))", out.text)
    if any(before != after for before, after in shapes):
        return "the output has another size"
    counts = out.numbers(r"by the plan \d+ -> # \| by profile \d+ -> #")
    pairs = list(zip(counts[::2], counts[1::2], strict=True))
    return wrong(
        any(plan != profile for plan, profile in pairs), "MACs of the plan are not those left"
    )


def threads_profile(out: Output) -> str:
    """Nothing of the process is changed for others."""
    drawn, different = out.numbers(r"drawn: # different: #")
    chance = drawn**2 / 2**25  # pairs of equal numbers among so many of 24 bits
    return wrong("fast path on: True" not in out.text, "attention's fast path stays off") or wrong(
        drawn - different > chance + 4 * chance**0.5 + 1, "random numbers repeat"
    )


def checkpointing(out: Output) -> str:
    """Gradients of a recomputation are those without; a typed error names what cannot be."""
    failed = re.findall(r"use_reentrant = (?:True|False|None) (\w+) ", out.text)
    if any(name not in TYPED - {"CheckpointError"} for name in failed):  # torch has one, too
        return "an error from inside"
    return at_most(r"of the gradient: #", 1e-5, "other gradients, silently")(out)


def same_noise(out: Output) -> str:
    """An addition of zeros in front changes nothing."""
    plain, added = out.numbers(r"# dB plain, # dB")
    return wrong(plain < 20 or abs(plain - added) > 0.5, "another network in training")


TYPED_IS_RIGHT = frozenset(
    ("aux_head_prune", "bf16_noop", "early_exit_prune", "exported_program", "masked_weights_prune",
     "other_evaluation", "qat_checkpointing", "saved_metadata")
)  # fmt: skip
"""Scripts that may end in a typed error: it says what cannot be done."""

JUDGES: dict[str, Judge] = {
    "aux_head_prune": aux_head,
    "averaged_masks": averaged,
    "bf16_noop": quantizers,
    "cached_grid_export": at_most(r"difference: #", 0.1, "the file computes something else"),
    "cached_grid_ptq": cached_grid,
    "damaged_plans": damaged,
    "dict_order_names": names_of_inputs,
    "early_exit_prune": every("classes at the early exit: 10 "),
    "edited_criterion": every("same key: False"),
    "exported_program": no_raw,
    "kept_activation": no_raw,
    "killed_save": every("loaded"),
    "late_gradient": late_gradient,
    "list_images_ptq": images_unsplit,
    "lsq_reload": lsq_reload,
    "masked_weights_prune": masked_weights,
    "old_weight_norm": no_raw,
    "other_evaluation": lambda out: wrong(
        not any(out.numbers(r"'second': #")), "the second function is never called"
    ),
    "profile_in_threads": threads_profile,
    "ptq_beside_export": lambda out: (
        no_raw(out) or at_most(r"wrong: # of", 0, "networks without quantizers")(out)
    ),
    "qat_checkpointing": checkpointing,
    "report_injection": every("script: False", "link: False"),
    "saved_metadata": every("equal: True"),
    "text_batches": every("fit ok", "fit, norms re-estimated ok", "ptq ok"),
    "threads": every("errors: []", "alone: 0 of"),
    "train_only_call": same_noise,
}


def judgement(name: str, out: Output) -> str:
    """One cell: ``right``, ``**wrong**: why``, ``not judged``."""
    judge = JUDGES.get(name)
    if judge is None:
        return "not judged"
    if out.failure:
        if name not in TYPED_IS_RIGHT or not out.typed:
            return f"**wrong**: it ends in {'a typed' if out.typed else 'an untyped'} error"
        said = [line for line in out.text.splitlines() if " RAW " in line]
        return "**wrong**: raw errors" if said else "typed error"
    try:
        reason = judge(out)
    except (ValueError, IndexError):
        reason = "what it printed cannot be read"
    return f"**wrong**: {reason}" if reason else "right"


def run(script: Path, seconds: float) -> Output:
    """Run one script in an empty folder.

    Args:
        script: a Python file.
        seconds: until it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "src"),
            "TMPDIR": folder,
            "COLUMNS": "200",
        }
        try:
            done = subprocess.run(
                [sys.executable, str(script.resolve())],
                cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            return Output(text.replace(folder, "TMP"), f"TimeoutExpired: after {seconds:.0f} s")
        failure = ""
        if done.returncode != 0:
            raised = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", done.stderr, re.MULTILINE)
            failure = raised[-1] if raised else f"exit status {done.returncode}"
        return Output(done.stdout.replace(folder, "TMP"), failure.replace(folder, "TMP"))


def about(script: Path) -> str:
    """The first sentence of the comment at the top of a script."""
    lines = []
    for line in script.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(lines))[0]


def cell(text: str) -> str:
    """A text within a table: short, and nothing that Markdown would read."""
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return f"`{short.strip().replace('|', '¦').replace('`', chr(39))}`"


def outcomes(scripts: Sequence[Path], seconds: float) -> dict[str, tuple[str, Output]]:
    """Name of each script → judgement, and what it printed."""
    found = {}
    for script in scripts:
        started = time.monotonic()
        out = run(script, seconds)
        verdict = judgement(script.stem, out)
        found[script.stem] = verdict, out
        print(f"{script.stem}: {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
    return found


def table(scripts: Sequence[Path], found: Mapping[str, tuple[str, Output]]) -> str:
    """A row per script: what it is about, before and now, what it printed."""
    before = json.loads(BEFORE.read_text())["outcomes"]
    rows: list[list[object]] = []
    for script in scripts:
        verdict, out = found[script.stem]
        name = script.stem
        printed = "<br>".join(cell(line) for line in out.lines[-8:])
        was = before.get(script.stem, "–")
        rows.append([name, cell(about(script)).strip("`"), was, verdict, printed])
    header = ["script", "what goes wrong", "before", "now", "what it prints now"]
    aligned = f"|{'---|' * len(header)}"
    return re.sub(r"^\|---\|.*$", aligned, markdown(header, rows), count=1, flags=re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts, print the table, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of scripts")
    parser.add_argument("--only", help="a part of the names of scripts; writes no page")
    parser.add_argument("--record", type=Path, help="write the outcomes there; writes no page")
    parser.add_argument("--seconds", type=float, default=300.0, help="that a script may run")
    options = parser.parse_args(arguments)
    scripts = sorted(p for p in options.folder.glob("*.py") if (options.only or "") in p.stem)
    if not scripts:
        parser.error(f"no scripts in {options.folder}")
    found = outcomes(scripts, options.seconds)
    bad = {name for name, (verdict, _) in found.items() if verdict.startswith("**")}
    if options.record:
        write_json(options.record, {"outcomes": {name: found[name][0] for name in found}})
        return len(bad)
    page = table(scripts, found)
    print(page)
    if not options.only:
        write_page(
            "faults",
            "Faults",
            "python -m benchmarks.faults ../shared/faults",
            [
                "Short programs that each stand for a kind of fault found in a trial or in public "
                "bug reports of other tools. Every one runs in a process of its own with one "
                "thread. *right*: it prints the right value, or one typed error where that is the "
                f"answer. Of {len(scripts)} scripts {len(bad)} are wrong. *Before* is the "
                "revision that the scripts were written against.",
                page,
            ],
        )
    return len(bad)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
