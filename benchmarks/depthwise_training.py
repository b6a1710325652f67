"""What strided depthwise convolutions cost in CPU training, and what stride 1 saves.

::

    python -m benchmarks.depthwise_training
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch
from torch.nn import functional as F

import slimkit as sk
from benchmarks.tables import markdown, write_page
from slimkit.train.strided import at_stride_one

CPU = torch.device("cpu")


def speeds(batch: int, repeats: int) -> dict[tuple[str, str], float]:
    """Images per second of a training step, medians of interleaved repeats."""
    torch.manual_seed(0)
    model = sk.build_model("slimkit:mobilenet_v1", num_classes=10, width=0.5, stem="cifar")
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(repeats + 2):
        for precision in ("fp32", "bf16"):
            for way in ("strided", "dense"):
                dense = at_stride_one(model, CPU) if way == "dense" else contextlib.nullcontext()
                start = time.perf_counter()
                with dense:
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        loss = F.cross_entropy(model(images).float(), labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                if repeat >= 2:  # the first steps allocate and choose kernels
                    times.setdefault((precision, way), []).append(time.perf_counter() - start)
    return {key: batch / statistics.median(seconds) for key, seconds in times.items()}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    found = speeds(options.batch, options.repeats)
    rows = [
        [precision, f"{found[precision, 'strided']:.0f}", f"{found[precision, 'dense']:.0f}"]
        for precision in ("fp32", "bf16")
    ]
    page = write_page(
        "depthwise_training",
        "Training strided depthwise convolutions on a CPU",
        f"python -m benchmarks.depthwise_training --batch {options.batch}",
        [
            markdown(["precision", "strided, images/s", "ours, images/s"], rows),
            f"MobileNetV1×0.5 on 32×32 pixels, batch {options.batch}, forward, backward and "
            f"step, median of {options.repeats} interleaved steps, {torch.get_num_threads()} "
            "threads. *Ours* replaces the kernel under bf16 autocast only; in fp32 both columns "
            "are the same code.",
        ],
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
