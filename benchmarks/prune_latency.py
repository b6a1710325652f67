"""Asked for 40 % less time: what comes out, measured again in the runtime.

::

    python -m benchmarks.prune_latency
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.measure.latency import benchmark_interleaved

REPEATS = 5


class Detector(nn.Module):
    """SSDLite-320: backbone and heads, without the anchors and the suppression behind them."""

    def __init__(self) -> None:
        super().__init__()
        model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None
        )
        self.backbone, self.head = model.backbone, model.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Boxes (N, anchors, 4) and class scores (N, anchors, 91)."""
        outputs: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return outputs


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 224),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(weights=None), 224),
    "ssdlite320 (backbone and heads)": (Detector, 320),
}


def measured(
    model: nn.Module, pruned: nn.Module, example: Tensor, options: argparse.Namespace
) -> tuple[float, float, float]:
    """Milliseconds before and after, and the ratio: medians of interleaved measurements."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {"before": Path(folder) / "before.onnx", "after": Path(folder) / "after.onnx"}
        for path, network in zip(paths.values(), (model, pruned), strict=True):
            sk.export(network, path, example, dynamic_batch=False)
        found = []
        for _ in range(REPEATS):
            timings = benchmark_interleaved(
                paths, backend=options.backend, threads=options.threads, seconds=options.seconds
            )
            found.append((timings["before"].median_ms, timings["after"].median_ms))
    return (
        statistics.median(before for before, _ in found),
        statistics.median(after for _, after in found),
        statistics.median(after / before for before, after in found),
    )


def main() -> None:
    """Prune all networks, measure them again and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.4, help="fraction of the time to remove")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per network and repeat")
    parser.add_argument("--size", type=int, help="other height and width in pixels (quick look)")
    parser.add_argument("--limit", type=int, help="only the first so many networks")
    options = parser.parse_args()
    rows = []
    for name, (factory, size) in list(NETWORKS.items())[: options.limit]:
        torch.manual_seed(0)
        model = factory().eval()
        example = torch.randn(1, 3, options.size or size, options.size or size)
        start = time.perf_counter()
        plan = sk.prune.plan(
            model,
            example,
            latency=options.latency,
            backend=options.backend,
            threads=options.threads,
        )
        seconds = time.perf_counter() - start
        pruned = sk.apply(copy.deepcopy(model), plan)
        before, after, ratio = measured(model, pruned, example, options)
        beyond = 100 * ((1 - options.latency) / ratio - 1)
        rows.append(
            [
                name,
                f"−{100 * options.latency:.0f} %",
                f"{before:.2f} → {after:.2f} ms",
                f"−{100 * (1 - ratio):.1f} %",
                f"{beyond:+.1f} %",
                f"{plan.before.macs / 1e6:.0f} → {plan.after.macs / 1e6:.0f} M "
                f"(−{100 * (1 - plan.after.macs / plan.before.macs):.1f} %)",
                f"{seconds:.0f} s",
            ]
        )
        print(rows[-1], flush=True)
    flags = f" --latency {options.latency:g} --backend {options.backend}"
    flags += f" --threads {options.threads}" + (f" --size {options.size}" if options.size else "")
    page = write_page(
        "prune_latency" + ("_quick" if options.limit or options.size else ""),
        "Pruning to a latency",
        f"python -m benchmarks.prune_latency{flags}",
        [
            markdown(["network", "request", "result", "faster", "beyond", "MACs", "search"], rows),
            f"Milliseconds in {options.backend}, {options.threads} thread"
            f"{'' if options.threads == 1 else 's'}, batch 1, random weights, uniform allocation, "
            f"channels in multiples of 8. The result is measured anew: the median of {REPEATS} "
            "measurements in which both files take turns. *Beyond*: by how much the wanted time is "
            "longer than the result; the target is 0 to 5 %. *Search*: wall time of "
            "`prune.plan(latency=…)`, most of it for exporting.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
