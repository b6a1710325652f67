"""How many networks can be pruned: torchvision, timm and BERT, each proved by equivalence.

Every torchvision network for classification, segmentation, detection, video and optical flow,
the smallest network of every timm module, and a Hugging Face BERT, all with random weights and
at most 150 M parameters, lose 30 % of the channels of every group. A network passes if the pruned
one runs, has at least 20 % fewer parameters, computes what the masked original computes, and
comes out identical when the saved plan is applied to a fresh copy::

    python -m benchmarks.prune_coverage

Finished networks are kept in ``runs/prune-coverage``; a second call goes on with the others.

``--sample 20 --seed 0`` measures 20 networks of the published page again (of at most 30 M
parameters, see ``--largest``), prints what the page says beside what is found, and writes nothing:
a check of some minutes after a change. The exit code is 1 where a network does worse.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkit as sk
from benchmarks.networks import (
    LARGEST,
    build,
    guarded,
    names_of,
    records_of,
    shake,
    supervise,
    work,
)
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.graph.equivalence import check_equivalence
from slimkit.prune.allocation.ranking import uniform
from slimkit.prune.targets import RemovalTarget

RATIO = 0.3
MUST_FALL = 0.2


# --- one network -------------------------------------------------------------------------


def covered(plan: Any, space: Any) -> tuple[float, dict[str, float]]:
    """Share of convolution and linear parameters that a prunable group touches; reasons else."""
    weights = {
        f"{path}.{local}"
        for path, module in space.model.named_modules()
        for local, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not isinstance(module, nn.Embedding) and local.endswith("weight")
    }
    named = dict(space.model.named_parameters())
    held = {slot.tensor for group in space.groups for slot in group.slots}
    total = sum(named[n].numel() for n in weights if n in named) or 1
    reasons: Counter[str] = Counter()
    by_layer = {layer.name: layer.reason for layer in plan.layers}
    for name in weights - held:
        if name in named:
            layer = name.removesuffix(".weight")
            reason = by_layer.get(layer) or by_layer.get(name) or "not reached by a group"
            reasons[reason] += named[name].numel()
    share = 1 - sum(reasons.values()) / total
    return share, {r: n / total for r, n in reasons.most_common(4)}


def measure(name: str, *, ratio: float, proof: bool) -> dict[str, Any]:
    """Prune one network and prove it."""
    model, example = build(name)
    model.eval()
    params = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {"name": name, "params": params}
    if params > LARGEST:
        return {**record, "status": "larger than 150 M parameters"}
    shake(model)
    start = time.perf_counter()
    space = sk.prune.space(model, example)
    record["groups"] = len(space.groups)
    target = RemovalTarget("ratio", ratio)
    plan = space.plan(space.fit(uniform(space, target), target))
    record["seconds"] = time.perf_counter() - start
    record["fell"] = 1 - plan.after.params / plan.before.params
    record["share"], record["reasons"] = covered(plan, space)
    pruned = sk.apply(copy.deepcopy(model), plan)
    outputs = run(pruned, example)
    record["really_fell"] = 1 - sum(p.numel() for p in pruned.parameters()) / params
    with tempfile.TemporaryDirectory() as folder:
        again = sk.Plan.load(plan.save(Path(folder) / "plan.json"))
    record["replay"] = same(outputs, run(sk.apply(copy.deepcopy(model), again), example))
    del pruned
    if proof:
        found = check_equivalence(model, plan, example)
        record["difference"], record["largest"] = found.max_abs_diff, found.max_abs_output
        record["equal"], record["masked"] = found.equal, len(found.masked_norms)
        record["proof"] = str(found)
    passes = record["replay"] and record["really_fell"] >= MUST_FALL and record.get("equal", True)
    return {**record, "status": "passes" if passes else failure(record)}


def failure(record: dict[str, Any]) -> str:
    """Why a network does not pass."""
    if not record.get("equal", True):
        return f"not equal: {record['proof']}"
    if not record["replay"]:
        return "the replayed plan gives other outputs"
    worst = "; ".join(f"{100 * share:.0f} %: {why}" for why, share in record["reasons"].items())
    return f"only {100 * record['really_fell']:.1f} % of the parameters go ({worst})"


def run(model: nn.Module, example: Any) -> list[torch.Tensor]:
    """All tensors of the output, on the same random numbers."""
    from slimkit.graph.capturing import tensors_in
    from slimkit.graph.isolation import own_inputs

    torch.manual_seed(3)
    with torch.no_grad():
        return [t.clone() for t in tensors_in(own_inputs(model, example).call(model))]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether all tensors are identical, NaN included."""
    return all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(first, second, strict=True)
    )


# --- all networks ------------------------------------------------------------------------


def page(records: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """The table of all networks."""
    counted = [r for r in records if not r["status"].startswith("larger")]
    passed = [r for r in counted if r["status"] == "passes"]
    shares = [r["share"] for r in passed]
    rows = [row(r) for r in sorted(counted, key=lambda r: (r["status"] == "passes", r["name"]))]
    header = [
        *("network", "parameters", "fell by", "prunable", "proof: difference / largest output"),
        *("seconds", "result"),
    ]
    larger = [r["name"] for r in records if r["status"].startswith("larger")]
    summary = (
        f"**{len(passed)} of {len(counted)} networks pass "
        f"({100 * len(passed) / max(len(counted), 1):.1f} %).** "
        f"Of those, {sum(s >= 0.9 for s in shares)} have at least 90 % and "
        f"{sum(s >= 0.98 for s in shares)} at least 98 % of their convolution and linear "
        "parameters in groups that can be pruned."
    )
    flags = f" --ratio {options.ratio:g}" if options.ratio != RATIO else ""
    return write_page(
        "prune_coverage",
        "Which networks can be pruned",
        f"python -m benchmarks.prune_coverage{flags}",
        [
            summary,
            (__doc__ or "").split("::")[0].partition("\n\n")[2] + ".",
            markdown(header, rows),
            "*Fell by*: parameters of the pruned network, counted. *Prunable*: share of "
            "convolution and linear parameters that a group touches which can lose channels. "
            "*Seconds*: capture, groups, scores and plan.",
            f"Left out for their size: {', '.join(larger) or 'none'}.",
        ],
    )


def row(record: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def shown(key: str, form: Callable[[Any], str]) -> str:
        return form(record[key]) if key in record else "–"

    proof = "–"
    if "difference" in record:
        proof = f"{record['difference']:.1e} / {record['largest']:.2g}"
    return [
        record["name"],
        shown("params", lambda n: f"{n / 1e6:.1f} M"),
        shown("really_fell", lambda f: f"{100 * f:.0f} %"),
        shown("share", lambda s: f"{100 * s:.0f} %"),
        proof,
        shown("seconds", lambda s: f"{s:.1f}"),
        record["status"].replace("|", "/").replace("\n", " ")[:200],
    ]


# --- a sample, beside the published page ---------------------------------------------------


def published() -> dict[str, list[str]]:
    """Network → its row of the published page."""
    text = (ROOT / "docs" / "benchmarks" / "prune_coverage.md").read_text()
    lines = re.findall(r"^\| (\w+:\S+) \|(.*)\|$", text, flags=re.MULTILINE)
    return {name: [name, *(cell.strip() for cell in rest.split("|"))] for name, rest in lines}


def sample(options: argparse.Namespace) -> bool:
    """Measure some networks of the page again; whether none does worse.

    Worse is another result than "passes", or a smaller share that can be pruned.
    """
    pages = published()
    small = [n for n, cells in pages.items() if float(cells[1].split()[0]) <= options.largest]
    names = sorted(random.Random(options.seed).sample(sorted(small), options.sample))
    rows, good = [], True
    for name in names:
        record = guarded(name, partial(measure, ratio=options.ratio, proof=not options.no_proof))
        now, before = row(record), pages[name]
        worse = before[6] == "passes" != now[6] or percent(now[3]) < percent(before[3])
        good = good and not worse
        rows.append([name, before[2], now[2], before[3], now[3], now[4], now[5], now[6]])
        print(f"{name}: {now[6]}{', WORSE' if worse else ''}", file=sys.stderr, flush=True)
    header = [
        *("network", "fell by: page", "now", "prunable: page", "now"),
        *("proof: difference / largest output", "seconds", "result"),
    ]
    print(markdown(header, rows))
    return good


def percent(cell: str) -> float:
    """``"52 %"`` → 52."""
    return float(cell.split(maxsplit=1)[0]) if cell[:1].isdigit() else -1.0


def main() -> None:
    """Measure all networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=RATIO)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prune-coverage")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--no-proof", action="store_true", help="leave out the proof (faster)")
    parser.add_argument("--sample", type=int, help="so many networks of the page, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--largest", type=float, default=30.0, help="10⁶ parameters, in a sample")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample is not None:
        sys.exit(0 if sample(options) else 1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        names = [name for name in names_of(options.out) if options.only in name]
        work(names, options.out, partial(measure, ratio=options.ratio, proof=not options.no_proof))
    else:
        supervise("benchmarks.prune_coverage")
        print(f"wrote {page(records_of(options.out), options)}")


if __name__ == "__main__":
    main()
