"""How fast int8 files are: ours beside ONNX Runtime's own and NNCF's, made from one network.

MobileNetV2, ResNet-18, ResNet-50 and EfficientNet-Lite0, batch 1, one thread, all files of a
network timed in turns; in ONNX Runtime against ``quantize_static``, in OpenVINO against NNCF's
PyTorch backend::

    python -m benchmarks.quantize_latency
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimkit as sk
from benchmarks.efficientnet_lite0 import calibration_images, network
from benchmarks.quantize_peers import nncf_openvino, ort_static
from benchmarks.tables import markdown, write_page
from slimkit.measure.latency import benchmark_interleaved
from slimkit.runtime import fusion_report

BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ALLOWED = " A file may have a quarter of the float one's bytes and 64 kB."
FIXED = " Every file is compiled for this shape; NNCF's has it fixed, ours leaves the batch open."
NETWORKS = ("mobilenet_v2", "resnet18", "resnet50", "efficientnet_lite0")


def build(name: str) -> nn.Module:
    """Random weights but for EfficientNet-Lite0: times do not depend on them."""
    if name == "efficientnet_lite0":
        return network()
    torch.manual_seed(0)
    return sk.build_model(f"torchvision:{name}").eval()


def files_of(model: nn.Module, images: Tensor, folder: Path, openvino: bool) -> dict[str, Path]:
    """Float, ours and the peer's for ONNX Runtime, or for OpenVINO."""
    files = {"float": folder / "float.onnx", "ours": folder / "ours.onnx"}
    sk.export(model, files["float"], images[:1])
    target = "openvino" if openvino else "onnxruntime"
    quantized = sk.quantize.ptq(model, images[:1], calibration=images.split(8), target=target)
    sk.export(quantized, files["ours"], images[:1])
    if openvino:
        files["peer"] = nncf_openvino(model, folder / "nncf.xml", images)
    else:
        files["peer"] = ort_static(files["float"], folder / "ort.onnx", images)
    return files


def rounds(files: dict[str, Path], backend: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Medians over repeats, and the median ratio ours / peer."""
    found = [
        benchmark_interleaved(files, backend=backend, threads=1, seconds=seconds)
        for _ in range(repeats)
    ]
    times = {n: statistics.median(r[n].median_ms for r in found) for n in files}
    ratios = [r["ours"].median_ms / r["peer"].median_ms for r in found]
    return {**times, "ratio": statistics.median(ratios), "spread": (min(ratios), max(ratios))}


def rows_of(names: list[str], backend: str, options: argparse.Namespace) -> list[list[str]]:
    """One table."""
    images = calibration_images(options.images)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            files = files_of(build(name), images, Path(folder), backend == "openvino")
            r = rounds(files, backend, options.repeats, options.seconds)
            fused = [] if backend == "openvino" else [float_nodes(files["ours"]), sizes(files)]
        spread = f"{r['ratio']:.2f} ({r['spread'][0]:.2f} … {r['spread'][1]:.2f})"
        shown = [f"{r[key]:.2f} ms" for key in ("float", "peer", "ours")]
        rows.append([name, *shown, spread, *fused])
        print(backend, rows[-1], flush=True)
    return rows


def sizes(files: dict[str, Path]) -> str:
    """Bytes of our file, and a quarter of the float one plus 64 kB."""
    ours, exact = (files[name].stat().st_size for name in ("ours", "float"))
    return f"{ours:,}, {exact // 4 + 64_000:,}"


def float_nodes(file: Path) -> str:
    """What the runtime still computes in float."""
    left = fusion_report(file).float_nodes
    return str(len(left))


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=32, help="to calibrate on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per file and repeat")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args()
    for backend in options.backends:
        print(f"wrote {write(backend, rows_of(options.networks, backend, options), options)}")


def write(backend: str, rows: list[list[str]], options: argparse.Namespace) -> Path:
    """One page for each runtime, as soon as it is measured."""
    peer = "NNCF" if backend == "openvino" else "quantize_static"
    more = [] if backend == "openvino" else ["ours, operators in float", "bytes, allowed"]
    return write_page(
        "quantize_latency" + ("_openvino" if backend == "openvino" else ""),
        f"How fast int8 files are in {BACKENDS[backend]}",
        f"python -m benchmarks.quantize_latency --repeats {options.repeats} --backends {backend}",
        [
            markdown(["network", "float", peer, "ours", f"ours / {peer}", *more], rows),
            f"Median of {options.repeats} rounds (lowest … highest), {options.seconds:g} s per "
            f"file and round, {options.images} calibration images, one image of 224 × 224 pixels."
            + (FIXED if backend == "openvino" else ALLOWED),
        ],
    )


if __name__ == "__main__":
    main()
