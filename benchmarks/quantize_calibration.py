"""What calibration takes: seconds and memory for 300 images, beside ONNX Runtime and NNCF.

EfficientNet-Lite0 at 224 pixels, two threads, each measurement in a process of its own. Reading
images and loading libraries are not counted, everything from the float network (the peers: its
ONNX file) to the quantized one is::

    python -m benchmarks.quantize_calibration
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import slimkit as sk
from benchmarks.efficientnet_lite0 import calibration_images, network
from benchmarks.quantize_peers import nncf_onnx, ort_static
from benchmarks.tables import ROOT, markdown, write_page

OURS = ("minmax", "moving_average", "mean_of_maxima", "percentile", "kl", "mse")
PEERS = ("ORT MinMax", "NNCF")
_REPEATS = 3


def one(label: str, images: int) -> dict[str, Any]:
    """Seconds, and MB of the peak above what was there before."""
    torch.set_num_threads(2)
    model, data = network(), calibration_images(images)
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        sk.export(model, file, data[:1])
        if label in OURS:  # the first call builds kernels and imports
            sk.quantize.ptq(model, data[:1], calibration=[data[:2]], observer=label)
        before = _peak()
        start = time.perf_counter()
        if label in OURS:
            sk.quantize.ptq(model, data[:1], calibration=data.split(10), observer=label)
        elif label == "NNCF":
            nncf_onnx(file, out, data)
        else:
            ort_static(file, out, data, method=label.removeprefix("ORT "))
        return {"seconds": time.perf_counter() - start, "peak": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(label: str, images: int) -> dict[str, Any]:
    """:func:`one` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.quantize_calibration", "--one", label]
    done = subprocess.run(
        [*command, "--images", str(images)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["died"])[-1][:120]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=_REPEATS)
    parser.add_argument(
        "--entropy", action="store_true", help="ONNX Runtime's too: minutes, and 20 GB of memory"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.images)))
        return
    labels = [*OURS, *PEERS, *(["ORT Entropy"] if options.entropy else [])]
    found: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for _ in range(options.repeats):
        for label in labels:
            found[label].append(run(label, options.images))
            print(label, found[label][-1], flush=True)
    rows = []
    for label, records in found.items():
        if any("error" in r for r in records):
            rows.append([label, "–", next(r["error"] for r in records if "error" in r)])
            continue
        seconds = [r["seconds"] for r in records]
        spread = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} … {max(seconds):.1f})"
        rows.append([label, spread, f"{max(r['peak'] for r in records):.0f} MB"])
    flags = " --entropy" if options.entropy else ""
    flags += f" --repeats {options.repeats}" if options.repeats != _REPEATS else ""
    page = write_page(
        "quantize_calibration",
        "What calibration takes",
        f"python -m benchmarks.quantize_calibration{flags}",
        [
            markdown(["method", "time", "peak memory"], rows),
            f"{options.images} images of 224 × 224 pixels; median of {options.repeats} (lowest … "
            "highest); the highest resident size minus the one before, the images themselves "
            f"({options.images * 0.6:.0f} MB) not counted.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
