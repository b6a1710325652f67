"""The quick start over several seeds: final network against baseline, on the same test images.

::

    python -m benchmarks.quickstart --seeds 0 1 2 3 4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.recipe import load_recipe, run_recipe

RECIPE = ROOT / "recipes" / "quickstart.yaml"


def main() -> None:
    """Parse the command line, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart-seeds")
    options = parser.parse_args()
    rows = []
    columns: list[list[float]] = [[], [], [], [], []]
    for seed in options.seeds:
        recipe = load_recipe(RECIPE, overrides=[f"seed={seed}"])
        report = run_recipe(recipe, options.out / f"seed{seed}")
        base, final = report["variants"][0], report["variants"][-1]
        times = [variant["latency"][0]["median_ms"] for variant in (base, final)]
        values = [
            base["metrics"]["accuracy"],
            final["metrics"]["accuracy"],
            final["metrics"]["accuracy"] - base["metrics"]["accuracy"],
            100 * final["cost"]["bytes"] / base["cost"]["bytes"],
            100 * times[1] / times[0],
        ]
        for column, value in zip(columns, values, strict=True):
            column.append(value)
        seconds = sum(stage["seconds"] for stage in final["stages"])
        rows.append(
            [
                seed,
                f"{values[0]:.2f}",
                f"{values[1]:.2f}",
                f"{values[2]:+.2f}",
                f"{base['cost']['bytes'] / 1000:.0f} → {final['cost']['bytes'] / 1000:.0f} kB "
                f"({values[3]:.1f} %)",
                f"{times[0]:.2f} → {times[1]:.2f} ms ({values[4]:.0f} %)",
                f"{seconds:.0f} s",
            ]
        )
    rows.append(
        [
            "mean (lowest … highest)",
            mean_spread(columns[0]),
            mean_spread(columns[1]),
            mean_spread(columns[2], sign=True),
            f"{mean_spread(columns[3], digits=1)} %",
            f"{mean_spread(columns[4], digits=0)} %",
            "",
        ]
    )
    header = ["seed", "baseline %", "final %", "Δ points", "file", "ORT, 1 thread", "training"]
    page = write_page(
        "quickstart",
        "Quick start: ResNet-20 on handwritten digits",
        "python -m benchmarks.quickstart --seeds " + " ".join(map(str, options.seeds)),
        [
            markdown(header, rows),
            "540 test images, of which one is 0.19 points. Accuracy and latency are those of "
            "the exported ONNX files in ONNX Runtime.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
