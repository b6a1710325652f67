"""What evaluating a detector costs beyond its forwards: decoding, suppression, average precision.

PicoDet-S with its published weights on coco128's 128 validation images, which are read before::

    python -m benchmarks.detection_evaluation picodet_s.safetensors

The data set is looked for under ``$SLIMKIT_DATA``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.inputs import Batch
from slimkit.models import load_checkpoint
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.detection.task import DetectionTask


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def forwards(model: nn.Module, batches: list[Batch]) -> None:
    """The network alone, without decoding."""
    for batch in batches:
        batch.inputs.call(model)


def main() -> None:
    """Parse the command line, measure, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    task = DetectionTask()
    settings = DetectionDataSettings(source="coco:coco128", image_size=320, validation=0)
    batches = list(task.load(settings).test)
    model = load_checkpoint(sk.build_model("slimkit:picodet_s"), chosen.checkpoint).eval()
    scores = task.evaluate(model, batches)  # also warms up
    pairs = [
        (seconds(lambda: forwards(model, batches)), seconds(lambda: task.evaluate(model, batches)))
        for _ in range(chosen.repeats)
    ]
    alone, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(100 * (both - one) / one for one, both in pairs)
    found = f"{scores['map']:.2f}"
    rows = [[f"{alone:.2f}", f"{whole:.2f}", f"{share:.0f} %", found]]
    print(rows)
    print(
        write_page(
            "detection_evaluation",
            "What evaluating a detector costs beyond its forwards",
            "python -m benchmarks.detection_evaluation picodet_s.safetensors",
            [
                markdown(["forwards, s", "evaluation, s", "beyond the forwards", "mAP"], rows),
                "128 images at 320×320 in batches of 16, read before; scores from 0.025, so that "
                f"hundreds of boxes an image enter suppression. Medians of {chosen.repeats} "
                f"interleaved rounds with {torch.get_num_threads()} threads.",
            ],
        )
    )


if __name__ == "__main__":
    main()
