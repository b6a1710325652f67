"""Which allocation keeps more accuracy: MobileNetV1 on CIFAR-10 with half of its MACs.

The baseline is that of ``recipes/cifar10/mobilenet_v1.yaml`` and comes from the cache where that
recipe was run. It is pruned once per allocation, and every result recovers in the same way.
Finished stages are cached, so an interrupted run goes on where it stopped::

    python -m benchmarks.prune_allocation --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.mobilenet import variation
from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.recipe import Recipe, run_recipe

ALLOCATIONS: dict[str, Any] = {
    "uniform": "uniform",
    "global": "global",
    "isomorphic": "isomorphic",
    "sensitivity": "sensitivity",
    "annealing": {"type": "annealing", "trials": 100},
    "genetic": {"type": "genetic", "trials": 100},
}
PADDLESLIM = {"uniform": "−1.59", "sensitivity": "−1.19"}  # MobileNetV1, ImageNet, −50 % MACs


def recipe_of(seed: int, names: list[str], options: argparse.Namespace) -> Recipe:
    """The baseline's stages, and one pruning with its recovery per allocation."""
    recovery = 4 if options.epochs is None else options.epochs
    stages: dict[str, Any] = {
        "recover": {"type": "train", "epochs": recovery, "lr": 0.05, "schedule": "one_cycle"}
    }
    baseline = ["begin", "train"]
    variants = {"baseline": baseline}
    for name in names:
        allocation = ALLOCATIONS[name]
        if options.trials is not None and isinstance(allocation, dict):
            allocation = {**allocation, "trials": options.trials}
        stages[f"prune-{name}"] = {
            "type": "prune",
            "macs": options.macs,
            "criterion": options.criterion,
            "allocation": allocation,
            "round_to": options.round_to,
        }
        variants[name] = [*baseline, f"prune-{name}"]
        variants[f"{name}-recovered"] = [*baseline, f"prune-{name}", "recover"]
    return variation(
        "prune-allocation", seed, variants, stages, limit=options.limit, epochs=options.epochs
    )


def table(reports: list[dict[str, Any]], names: list[str]) -> str:
    """Accuracy lost by each allocation, paired with the baseline of the same seed."""

    def accuracy(report: dict[str, Any], variant: str) -> float:
        found = next(v for v in report["variants"] if v["name"] == variant)
        return float(found["metrics"]["accuracy"])

    def change(variant: str, against: str) -> str:
        pairs = [accuracy(r, variant) - accuracy(r, against) for r in reports]
        return mean_spread(pairs, sign=True)

    def macs(variant: str) -> str:
        found = [
            100 * (v["cost"]["macs"] / r["variants"][0]["cost"]["macs"] - 1)
            for r in reports
            for v in r["variants"]
            if v["name"] == variant
        ]
        return f"{mean_spread(found, sign=True, digits=1)} %"

    rows = [
        [
            name,
            macs(name),
            change(name, "baseline"),
            change(f"{name}-recovered", "baseline"),
            "–" if name == names[0] else change(f"{name}-recovered", f"{names[0]}-recovered"),
            PADDLESLIM.get(name, "–"),
        ]
        for name in names
    ]
    header = ["allocation", "MACs", "before recovery", "after", f"after, against {names[0]}"]
    return markdown([*header, "PaddleSlim, ImageNet"], rows)


def main() -> None:
    """Parse the command line, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of MACs to remove")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument(
        "--allocations",
        nargs="+",
        choices=list(ALLOCATIONS),
        default=["uniform", "sensitivity", "annealing", "genetic"],
        help="the first is what the others are compared with",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prune-allocation")
    parser.add_argument("--trials", type=int, help="of a search (quick look)")
    parser.add_argument("--epochs", type=float, help="of every training (quick look)")
    parser.add_argument("--limit", type=int, help="images per split (quick look)")
    options = parser.parse_args()
    names: list[str] = options.allocations
    reports = [
        run_recipe(recipe_of(seed, names, options), options.out / f"seed{seed}")
        for seed in options.seeds
    ]
    (options.out / "summary.json").write_text(json.dumps([r["variants"] for r in reports]))
    base = [report["variants"][0]["metrics"]["accuracy"] for report in reports]
    seconds = {
        stage["name"]: stage["seconds"]
        for variant in reports[0]["variants"]
        for stage in variant["stages"]
    }
    shown = ", ".join(f"{name} {s / 60:.1f}" for name, s in seconds.items())
    quick = options.limit or options.epochs is not None or options.trials
    page = write_page(
        "prune_allocation" + ("_quick" if quick else ""),
        f"Allocations: MobileNetV1 on CIFAR-10, −{100 * options.macs:.0f} % MACs",
        "python -m benchmarks.prune_allocation --seeds "
        f"{' '.join(map(str, options.seeds))} --allocations {' '.join(names)} "
        f"--macs {options.macs:g} --criterion {options.criterion} --round-to {options.round_to}",
        [
            table(reports, names),
            f"Points of test accuracy against the unpruned network of the same seed "
            f"({mean_spread(base)} %), mean over the seeds (lowest … highest). Batch-norm "
            "statistics are measured anew on training images before both; recovery is four "
            "epochs on the labels alone. Allocations that evaluate do so by the loss on 8 "
            "batches of training images. PaddleSlim's figures are for another data set: they "
            "are no measurement of ours.",
            f"Minutes by stage, seed {options.seeds[0]}: {shown}.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
