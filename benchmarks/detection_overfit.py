"""Every detector learns eight scenes by heart: its loss, assignment and decoding fit each other.

::

    python -m benchmarks.detection_overfit

A finished detector is a record that is read again; ``--only`` runs some of them.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import slimkit as sk
from benchmarks.tables import PAGES, machine, markdown, write_page
from slimkit.tasks.detection.settings import BoxAugmentSettings, DetectionDataSettings
from slimkit.tasks.detection.task import DetectionTask
from slimkit.train import TrainSettings, fit

RECORDS = PAGES / "records" / "detection_overfit"
SIZES = {"min_size": 128, "max_size": 128}
CLASSES = 10
DETECTORS: dict[str, tuple[dict[str, Any], float]] = {
    "slimkit:picodet_s": ({"num_classes": CLASSES}, 0.002),
    "slimkit:picodet_m": ({"num_classes": CLASSES}, 0.002),
    "slimkit:picodet_l": ({"num_classes": CLASSES}, 0.002),
    "torchvision:ssdlite320_mobilenet_v3_large": ({"num_classes": CLASSES + 1}, 0.001),
    "torchvision:retinanet_resnet50_fpn": ({"num_classes": CLASSES + 1, **SIZES}, 0.0003),
    "torchvision:fcos_resnet50_fpn": ({"num_classes": CLASSES + 1, **SIZES}, 0.0003),
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn": (
        {"num_classes": CLASSES + 1, **SIZES},
        0.0005,
    ),
}
"""Model → arguments and learning rate; torchvision's count background as a class."""


def overfitted(name: str, steps: int) -> dict[str, Any]:
    """Train on eight scenes and judge on the same ones."""
    arguments, rate = DETECTORS[name]
    still = BoxAugmentSettings(flip=0, scale=None, colour=0)
    settings = DetectionDataSettings(
        source="digit-scenes:8", batch_size=8, eval_batch_size=8, augment=still, validation=0
    )
    task = DetectionTask()
    splits = task.load(settings)
    torch.manual_seed(0)
    model = sk.build_model(name, **arguments)
    start = time.perf_counter()
    fit(
        model,
        splits.train,
        batch_loss=task.loss,
        settings=TrainSettings(
            epochs=steps,
            lr=rate,
            optimizer="adamw",
            weight_decay=0,
            schedule="one_cycle",
            clip_grad_norm=10,
            batch_norm_reestimation=1,
            precision="fp32",
        ),
        label=name,
    )
    seconds = time.perf_counter() - start
    scores = task.evaluate(model, splits.calibration)
    return {
        "name": name,
        "steps": steps,
        "seconds": round(seconds, 1),
        "map": scores["map"],
        "map50": scores["map50"],
        "machine": machine(),
    }


def main() -> None:
    """Parse the command line, run what has no record, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--steps", type=int, default=200)
    chosen = parser.parse_args()
    rows = []
    for name in DETECTORS:
        file = RECORDS / f"{name.replace(':', '_')}.json"
        if not file.exists() and name in chosen.only:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(overfitted(name, chosen.steps), indent=1))
        if not file.exists():
            rows.append([name, "not run", "", "", ""])
            continue
        found = json.loads(file.read_text())
        figures = [f"{found[key]:.1f}" for key in ("map50", "map")]
        rows.append([name, *figures, found["steps"], found["seconds"]])
        print(*rows[-1], flush=True)
    print(
        write_page(
            "detection_overfit",
            "Every detector learns eight scenes by heart",
            "python -m benchmarks.detection_overfit",
            [
                markdown(["detector", "AP50", "mAP", "steps", "seconds"], rows),
                "Eight 128×128 scenes of digits in one batch, from random weights, judged on the "
                "same scenes; must reach 90 AP50.",
            ],
        )
    )


if __name__ == "__main__":
    main()
