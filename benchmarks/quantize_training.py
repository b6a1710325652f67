"""Quantization-aware training: accuracy on CIFAR-10, and what a training step costs.

Accuracy is that of the exported files in ONNX Runtime on the 10,000 test images, from the recipes
``recipes/cifar10/qat.yaml`` (ResNet-20, trained there), ``qat_resnet56.yaml`` (ResNet-56 from its
checkpoint) and ``mobilenet_v1.yaml`` (its baseline, from the cache where that recipe was run). The
step is measured beside that of the float network in channels_last, fp32, in turns::

    python -m benchmarks.quantize_training

Finished stages come from the cache; ``--steps`` measures the steps alone and keeps them for the
page, for a machine where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimkit as sk
from benchmarks.mobilenet import variation
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.recipe import Recipe, load_recipe, run_recipe

RECIPES = ROOT / "recipes" / "cifar10"


def mobilenet(seed: int) -> Recipe:
    """The baseline of ``mobilenet_v1.yaml`` with what ``qat.yaml`` does to its float network."""
    values = load_recipe(RECIPES / "qat.yaml").model_dump(mode="json")
    stages = {name: values["stages"][name] for name in ("ptq", "qat", "longer")}
    return variation("qat-mobilenet-v1", seed, values["variants"], stages)


RECIPE_OF = {
    "ResNet-56 (checkpoint)": "qat_resnet56.yaml",
    "ResNet-20": "qat.yaml",
    "MobileNetV1×0.5": "qat.yaml",
}
STEPS = {  # name: (images, pixels)
    "torchvision:resnet18": (16, 224),
    "torchvision:mobilenet_v2": (16, 224),
    "slimkit:resnet20": (128, 32),
}
WAYS = ("float", "observed", "lsq")


# --- accuracy ----------------------------------------------------------------------------


def reports(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The report of each network, from the cache where it can."""
    found = {}
    for name in options.networks:
        folder = options.out / name.split()[0].replace("×", "-")
        own = name.startswith("MobileNet")
        recipe = mobilenet(options.seed) if own else load_recipe(RECIPES / RECIPE_OF[name])
        found[name] = run_recipe(recipe, folder)
    return found


def accuracy_table(found: dict[str, dict[str, Any]]) -> str:
    """One row per network."""
    rows = []
    for name, report in found.items():
        by_name = {variant["name"]: variant for variant in report["variants"]}
        top1 = {key: variant["metrics"]["accuracy"] for key, variant in by_name.items()}
        changes = [
            f"{top1[key]:.2f} ({top1[key] - top1['float']:+.2f})" if key in top1 else "–"
            for key in ("ptq", "qat", "longer")
        ]
        size = by_name["qat"]["cost"]["bytes"] / by_name["float"]["cost"]["bytes"]
        epochs = load_recipe(RECIPES / RECIPE_OF[name]).stages["qat"].training_epochs()
        rows.append(
            [name, f"{top1['float']:.2f} %", *changes, f"{epochs:g}", f"{100 * size:.1f} %"]
        )
    header = ["network", "float", "PTQ", "QAT", "float, trained on", "epochs", "file, QAT / float"]
    return markdown(header, rows)


# --- steps -------------------------------------------------------------------------------


def step_times(name: str, repeats: int) -> dict[str, float]:
    """Seconds of a training step, medians of interleaved repeats."""
    images, pixels = STEPS[name]
    torch.manual_seed(0)
    x = torch.randn(images, 3, pixels, pixels).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (images,))
    steps = {way: _step(_network(name, way, x), x, labels) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:  # the first allocates and chooses kernels
                times[way].append(time.perf_counter() - start)
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def _network(name: str, way: str, x: Tensor) -> nn.Module:
    model = sk.build_model(name).to(memory_format=torch.channels_last)
    if way == "float":
        return model.train()
    quantized = sk.quantize.qat(model.eval(), x[:1], calibration=[x], scales=way)
    return quantized.to(memory_format=torch.channels_last).train()


def _step(model: nn.Module, x: Tensor, labels: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, fused=True)

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps_section(measured: dict[str, Any]) -> str:
    """The table of all networks, and how it came to be."""
    rows = []
    for name, times in measured["networks"].items():
        images, pixels = STEPS[name]
        shown = [f"{times[way]:.3f} s" for way in WAYS]
        ratios = [f"{times[way] / times['float']:.2f}×" for way in WAYS[1:]]
        rows.append([name, f"{images} × {pixels} px", *shown, *ratios])
    header = ["network", "batch", "float", "observed", "lsq", "observed / float", "lsq / float"]
    return (
        f"{markdown(header, rows)}\n\nMedian of {measured['repeats']} interleaved steps (forward, "
        f"backward, SGD), {measured['threads']} threads."
    )


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quantize-training")
    parser.add_argument("--networks", nargs="+", choices=RECIPE_OF, default=list(RECIPE_OF))
    parser.add_argument("--seed", type=int, default=0, help="of MobileNetV1's training")
    parser.add_argument("--repeats", type=int, default=7, help="of each step")
    parser.add_argument("--steps", action="store_true", help="measure the steps, nothing else")
    options = parser.parse_args()
    kept = options.out / "steps.json"
    if options.steps or not kept.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        times = {name: step_times(name, options.repeats) for name in STEPS}
        measured = {"networks": times, "repeats": options.repeats}
        kept.write_text(json.dumps({**measured, "threads": torch.get_num_threads()}))
    steps = steps_section(json.loads(kept.read_text()))
    print(steps)
    if options.steps:
        return
    flags = f" --seed {options.seed}" if options.seed else ""
    if len(options.networks) < len(RECIPE_OF):
        flags += " --networks " + " ".join(f"'{name}'" for name in options.networks)
    page = write_page(
        "quantize_training",
        "Quantization-aware training",
        f"python -m benchmarks.quantize_training{flags}",
        [
            f"## Accuracy on CIFAR-10\n\n{accuracy_table(reports(options))}",
            "In brackets: points against the float network, which itself is QAT's teacher. "
            "*Trained on* is that network after as many epochs more in float, by the same settings "
            "and teacher: what of QAT's gain is due to training. "
            "ResNet-20 is trained for ten short epochs; "
            "MobileNetV1 is the baseline of `recipes/cifar10/mobilenet_v1."
            "yaml`, ResNet-56 comes from its checkpoint. The images are JPEG re-encodings of "
            "CIFAR-10.",
            f"## A training step\n\n{steps}",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
