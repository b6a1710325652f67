"""PicoDet-S on blood cells (BCCD): from its COCO weights, then pruned with its original as teacher.

Runs ``recipes/detection/picodet_bccd.yaml`` once per seed and writes the paired differences.
Every finished stage is cached, and a finished seed is a record that is read again::

    python -m benchmarks.detection_bccd --seeds 0 1 --checkpoint picodet_s.safetensors

The checkpoint is what ``python -m benchmarks.picodet_weights`` writes with ``--images``; the data
set is looked for under ``$SLIMKIT_DATA``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.tables import PAGES, ROOT, machine, markdown, mean_spread, write_page
from slimkit.recipe import load_recipe, run_recipe

RECIPE = ROOT / "recipes" / "detection" / "picodet_bccd.yaml"
RECORDS = PAGES / "records" / "detection_bccd"

Record = dict[str, Any]


def recorded(report: Record) -> Record:
    """What the page needs of a report."""
    return {
        "machine": machine(),
        "variants": [
            {
                "name": variant["name"],
                "metrics": variant["metrics"],
                "cost": {key: variant["cost"].get(key) for key in ("params", "macs", "bytes")},
                "latency": variant["latency"],
                "stages": [
                    {
                        "name": stage["name"],
                        "seconds": stage["seconds"],
                        "precision": stage.get("precision"),
                        "epochs": len(stage.get("history", [])),
                    }
                    for stage in variant["stages"]
                ],
            }
            for variant in report["variants"]
        ],
    }


def record_of(seed: int, out: Path, checkpoint: str | None) -> Record:
    """The record of a seed; it is run where there is none."""
    file = RECORDS / f"seed{seed}.json"
    if file.exists():
        found: Record = json.loads(file.read_text())
        return found
    report = out / f"seed{seed}" / "report.json"
    if report.exists():
        made: Record = json.loads(report.read_text())
    else:
        overrides = [f"seed={seed}"]
        if checkpoint is not None:
            overrides.append(f"model.checkpoint={checkpoint}")
        made = run_recipe(load_recipe(RECIPE, overrides=overrides), out / f"seed{seed}")
    record = recorded(made)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1))
    return record


def fastest(variant: Record) -> float:
    """Milliseconds in the runtime that is best for this file."""
    return min(timing["median_ms"] for timing in variant["latency"])


def table(records: list[Record]) -> str:
    """Rows: variants; differences are paired with the baseline of the same seed."""
    names = list(dict.fromkeys(v["name"] for record in records for v in record["variants"]))
    rows = []
    for name in names:
        pairs = [
            (variant, record["variants"][0])
            for record in records
            for variant in record["variants"]
            if variant["name"] == name
        ]
        own = [variant for variant, _ in pairs]
        first = name == names[0]
        drop = [v["metrics"]["map"] - b["metrics"]["map"] for v, b in pairs]
        size = [100 * v["cost"]["bytes"] / b["cost"]["bytes"] for v, b in pairs]
        macs = [100 * (v["cost"]["macs"] / b["cost"]["macs"] - 1) for v, b in pairs]
        speed = [fastest(b) / fastest(v) for v, b in pairs]
        rows.append(
            [
                name,
                len(pairs),
                mean_spread([v["metrics"]["map"] for v in own]),
                mean_spread([v["metrics"]["map50"] for v in own]),
                "–" if first else mean_spread(drop, sign=True),
                f"{own[0]['cost']['bytes'] / 1e6:.2f} MB"
                if first
                else f"{mean_spread(size, digits=1)} %",
                "–" if first else f"{mean_spread(macs, sign=True, digits=1)} %",
                "1.00×" if first else f"{mean_spread(speed)}×",
            ]
        )
    header = ["variant", "seeds", "mAP", "AP50", "Δ mAP", "file", "MACs", "faster"]
    return markdown(header, rows)


def cost(records: list[Record], seeds: list[int]) -> str:
    """What each stage took, per seed."""
    rows = []
    for seed, record in zip(seeds, records, strict=True):
        longest = max(record["variants"], key=lambda variant: len(variant["stages"]))
        shown = [
            f"{stage['name']} {stage['seconds'] / 60:.1f}"
            + (f" ({stage['epochs']} epochs, {stage['precision']})" if stage["epochs"] else "")
            for stage in longest["stages"]
        ]
        rows.append([seed, ", ".join(shown)])
    return markdown(["seed", "minutes by stage"], rows)


def main() -> None:
    """Parse the command line, run or read, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "detection-bccd")
    parser.add_argument("--checkpoint", help="by default the recipe's")
    parser.add_argument("--note", default="", help="how the stages were run, for below their costs")
    chosen = parser.parse_args()
    records = [record_of(seed, chosen.out, chosen.checkpoint) for seed in chosen.seeds]
    seeds = " ".join(map(str, chosen.seeds))
    print(
        write_page(
            "detection_bccd",
            "PicoDet-S on blood cells: from COCO weights, pruned",
            f"python -m benchmarks.detection_bccd --seeds {seeds}",
            [
                table(records),
                "Mean over the seeds (lowest … highest). mAP and AP50 are those of the exported "
                "ONNX file on the 72 test images at 320×320; the 87 validation images chose the "
                "settings. Differences are paired with the baseline of the same seed. *faster* is "
                "the ratio of medians with one thread, each file in the faster of the runtimes "
                "that were measured.",
                "## Cost\n\n" + cost(records, chosen.seeds),
                *([chosen.note] if chosen.note else []),
            ],
        )
    )


if __name__ == "__main__":
    main()
