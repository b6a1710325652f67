"""PaddleSlim's headline table (MobileNetV1: KD, KD + int8, pruned + int8) in its CIFAR-10 form.

Runs ``recipes/cifar10/mobilenet_v1.yaml`` once per seed and writes the paired differences.
Every finished stage is cached, so an interrupted run goes on where it stopped::

    python -m benchmarks.cifar10_mobilenet_v1 --seeds 0 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.mobilenet import RECIPE
from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.models import build_model, load_checkpoint
from slimkit.recipe import load_recipe, run_recipe
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import load_data

PADDLESLIM = {  # ImageNet, MobileNetV1 70.91 % / 17.0 MB: (top-1 difference, size change in %)
    "distilled": ("+1.06", "–"),
    "distilled-int8": ("+1.10", "−71.76 %"),
    "pruned-int8": ("−1.71", "−86.47 %"),
}


def run(seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """One report per seed, from the cache where it can."""
    reports = []
    for seed in seeds:
        recipe = load_recipe(RECIPE, overrides=[f"seed={seed}"])
        reports.append(run_recipe(recipe, out / f"seed{seed}"))
    return reports


def load(seeds: list[int], out: Path) -> list[dict[str, Any]]:
    """The reports of earlier runs."""
    return [json.loads((out / f"seed{seed}" / "report.json").read_text()) for seed in seeds]


def teacher_accuracy() -> float:
    """Of the ResNet-56 on the same test images, in percent."""
    recipe = load_recipe(RECIPE)
    settings = recipe.teachers["resnet56"]
    assert settings.checkpoint is not None
    teacher = load_checkpoint(build_model(settings.name), settings.checkpoint)
    return ClassificationTask().evaluate(teacher, load_data(recipe.data).test)["accuracy"]


def table(reports: list[dict[str, Any]]) -> str:
    """Rows: variants; differences are paired with the baseline of the same seed."""
    names = [variant["name"] for variant in reports[0]["variants"]]
    rows = []
    for number, name in enumerate(names):
        variants = [report["variants"][number] for report in reports]
        bases = [report["variants"][0] for report in reports]
        accuracy = [v["metrics"]["accuracy"] for v in variants]
        pairs = list(zip(variants, bases, strict=True))
        drop = [v["metrics"]["accuracy"] - b["metrics"]["accuracy"] for v, b in pairs]
        size = [100 * (v["cost"]["bytes"] / b["cost"]["bytes"] - 1) for v, b in pairs]
        macs = [100 * (v["cost"]["macs"] / b["cost"]["macs"] - 1) for v, b in pairs]
        speed = [b["latency"][0]["median_ms"] / v["latency"][0]["median_ms"] for v, b in pairs]
        first = number == 0
        rows.append(
            [
                name,
                mean_spread(accuracy),
                "–" if first else mean_spread(drop, sign=True),
                f"{variants[0]['cost']['bytes'] / 1e6:.2f} MB"
                if first
                else f"{mean_spread(size, sign=True)} %",
                "–" if first else f"{mean_spread(macs, sign=True, digits=1)} %",
                f"{mean_spread([v['latency'][0]['median_ms'] for v in variants], digits=3)} ms",
                "1.00×" if first else f"{mean_spread(speed)}×",
                *PADDLESLIM.get(name, ("70.91 %", "17.0 MB")),
            ]
        )
    header = ["variant", "top-1 %", "Δ top-1", "file", "MACs", "ORT, 1 thread", "faster"]
    return markdown([*header, "PaddleSlim Δ", "PaddleSlim size"], rows)


def cost(reports: list[dict[str, Any]], seeds: list[int]) -> str:
    """What each stage took, per seed, on the run that trained it."""
    rows = []
    for seed, report in zip(seeds, reports, strict=True):
        seen: dict[str, float] = {}
        for variant in report["variants"]:
            chain = ""
            for stage in variant["stages"]:
                chain += "/" + stage["name"]
                epochs = sum(epoch["seconds"] for epoch in stage.get("history", []))
                seen[chain] = max(stage["seconds"], epochs)  # a resumed stage counts its last part
        total = sum(seen.values())
        shown = ", ".join(f"{chain[1:]} {s / 60:.1f}" for chain, s in seen.items())
        rows.append([seed, f"{total / 60:.1f} min", shown])
    return markdown(["seed", "sum of stages", "minutes by stage"], rows)


def main() -> None:
    """Parse the command line, run, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cifar10-mobilenet-v1")
    parser.add_argument("--table-only", action="store_true", help="only rewrite the page")
    parser.add_argument("--note", default="", help="how the stages were run, for below their costs")
    options = parser.parse_args()
    reports = (load if options.table_only else run)(options.seeds, options.out)
    seeds = " ".join(map(str, options.seeds))
    page = write_page(
        "cifar10_mobilenet_v1",
        "MobileNetV1 on CIFAR-10: distilled, int8, pruned",
        f"python -m benchmarks.cifar10_mobilenet_v1 --seeds {seeds}",
        [
            table(reports),
            "Mean over the seeds (lowest … highest). Differences are paired: each variant "
            "against the baseline of its own seed. Accuracy is that of the exported ONNX file "
            "in ONNX Runtime on the 10,000 test images. The images are JPEG re-encodings of "
            f"CIFAR-10, on which the ResNet-56 teacher reaches {teacher_accuracy():.1f} %. The two "
            "right columns are PaddleSlim's figures for ImageNet, another task: they set the "
            "shape of the table, they are not a measurement of ours.",
            "## Cost\n\n" + cost(reports, options.seeds),
            *([options.note] if options.note else []),
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
