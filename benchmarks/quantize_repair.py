"""Networks that are known to be hard to quantize: RepVGG-style and MobileNetV3-style, on CIFAR-10.

A RepVGG-style network is trained with three branches a block and collapsed into one convolution
each, whose weights have long tails; a MobileNetV3 has squeeze-and-excitation and hard-swish. Both
are trained by ``recipes/cifar10/qat.yaml``, cached, and quantized after training in four ways;
accuracy is that of the exported files in ONNX Runtime on the 10,000 test images::

    python -m benchmarks.quantize_repair
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import slimkit as sk
from benchmarks.hard_networks import collapsed, mobilenet_v3, rep_vgg
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.recipe import load_recipe, parse_recipe, run_recipe
from slimkit.runtime import open_session, parity
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import ImageSplits, load_data
from slimkit.tasks.running import session_run

RECIPE = ROOT / "recipes" / "cifar10" / "qat.yaml"
EXAMPLE = torch.zeros(1, 3, 32, 32)
BATCHES = 8  # of 128 training images, as in the recipe
METHODS = ["gptq", "bias_correction"]
WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "repaired": {"methods": METHODS},
    "per tensor, no repair": {"granularity": "tensor", "methods": []},
    "per tensor, defaults": {"granularity": "tensor"},
}
"""Keywords of ``ptq``."""


NETWORKS = {"RepVGG-style": rep_vgg, "MobileNetV3-Small": mobilenet_v3}


def trained(name: str, out: Path) -> nn.Module:
    """By the recipe's two training stages, from the cache where it can."""
    build = NETWORKS[name]
    values = load_recipe(RECIPE).model_dump(mode="json")
    stages = {stage: values["stages"][stage] for stage in ("begin", "train")}
    recipe = {
        **values,
        "name": "quantize-repair",
        "model": {"name": f"benchmarks.hard_networks:{build.__name__}"},
        "stages": stages,
        "variants": {"float": list(stages)},
        "measure": {"seconds": 0.2, "parity_batches": 1},
    }
    run_recipe(parse_recipe(recipe), out)
    return sk.load(out / "variants" / "float" / "model", model=build()).eval()


def rows_of(name: str, model: nn.Module, splits: ImageSplits, out: Path) -> list[list[str]]:
    """One row for each way."""
    task = ClassificationTask()
    batches = list(splits.calibration.batches(BATCHES))

    def accuracy(network: nn.Module, file: Path) -> float:
        sk.export(network, file, EXAMPLE, dynamic_batch=True)
        session = open_session(file, threads=2)
        return task.evaluate(session_run(session), splits.test)["accuracy"]

    base = accuracy(model, out / "float.onnx")
    rows = [[name, "float", f"{base:.2f} %", "–", "–", "–"]]
    for label, choices in WAYS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they are in the plan
            quantized = sk.quantize.ptq(
                copy.deepcopy(model), EXAMPLE, calibration=batches, **choices
            )
        file = out / f"{label.replace(', ', '-').replace(' ', '-')}.onnx"
        top1 = accuracy(quantized, file)
        found = parity(model, file, batches[:1])
        assert found.top1_agreement is not None
        noise = f"{found.sqnr_db:.1f} dB, same top-1 {100 * found.top1_agreement:.1f} %"
        told = "; ".join(quantized.plan.warnings) or "none"
        rows.append(["", label, f"{top1:.2f} %", f"{top1 - base:+.2f}", noise, told])
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Train, quantize, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quantize-repair")
    options = parser.parse_args()
    splits = load_data(load_recipe(RECIPE).data)
    rows = []
    for name in NETWORKS:
        out = options.out / name
        model = collapsed(trained(name, out))
        rows += rows_of(name, model, splits, out)
    page = write_page(
        "quantize_repair",
        "Networks that are hard to quantize",
        "python -m benchmarks.quantize_repair",
        [
            markdown(["network", "quantized by", "top-1", "Δ", "outputs", "warning"], rows),
            (__doc__ or "").split("::")[0].partition("\n\n")[2] + ".",
            f"Calibrated on {BATCHES} batches of training images. *Defaults* are `ptq(model, "
            "example, calibration=…)`; *repaired* adds `methods=['gptq', 'bias_correction']`, "
            "which per tensor is the default.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
