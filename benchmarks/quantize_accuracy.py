"""What quantization costs in accuracy: EfficientNet-Lite0 on ImageNet, beside ORT and NNCF.

Every file is calibrated on the same 300 unlabelled images and run in ONNX Runtime on 200 labelled
ones (one each of 200 classes). *Agreement* is the share of images with the same answer as the
float network's::

    python -m benchmarks.quantize_accuracy

Finished files and figures are kept in ``runs/quantize-accuracy``; a second call goes on with the
others. The 200 images served to look at, nothing was chosen by them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimkit as sk
from benchmarks.efficientnet_lite0 import answers, calibration_images, labelled_images, network
from benchmarks.quantize_peers import nncf_onnx, ort_static
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.quantize.methods.bias_correction import BiasCorrection
from slimkit.quantize.methods.bias_tuning import BiasTuning
from slimkit.quantize.methods.gptq import GPTQ
from slimkit.quantize.targets import TARGETS
from slimkit.runtime.surroundings import saturates_int8_pairs

Make = Callable[[nn.Module, Path, Path, Tensor], Any]


def ours(**choices: Any) -> Make:
    """A row made by ``sk.quantize.ptq``."""

    def make(model: nn.Module, _: Path, out: Path, images: Tensor) -> Any:
        data = {} if choices.get("mode") == "dynamic" else {"calibration": images.split(10)}
        quantized = sk.quantize.ptq(model, images[:1], **data, **choices)
        return sk.export(quantized, out, images[:1], dynamic_batch=True)

    return make


def ours_mirrored(model: nn.Module, _: Path, out: Path, images: Tensor) -> Any:
    """4-bit weights, calibrated on the images and their mirror images, as training would show them.

    As by default, but on more images: three quarters for GPTQ, all of them for bias tuning.
    """
    both = [part for half in images.split(10) for part in (half, half.flip(-1))]
    count = 2 * len(images)
    most = 3 * count // 4
    methods = [
        GPTQ(images=most, positions=64 * 400, behind_activation=True),
        BiasCorrection(images=most),
        BiasTuning(images=count, steps=90),
    ]
    quantized = sk.quantize.ptq(model, images[:1], calibration=both, weight_bits=4, methods=methods)
    return sk.export(quantized, out, images[:1], dynamic_batch=True)


def ort(**choices: Any) -> Make:
    """A row made by ONNX Runtime."""
    return lambda _, float_file, out, images: ort_static(float_file, out, images, **choices)


def nncf(**choices: Any) -> Make:
    """A row made by NNCF on the ONNX file."""
    return lambda _, float_file, out, images: nncf_onnx(float_file, out, images, **choices)


SYMMETRIC = replace(TARGETS.get("onnxruntime"), zero_points=frozenset())
BEST: dict[str, Any] = {"methods": ["gptq", "bias_correction"]}
OURS: dict[str, Make] = {
    "Slimkit, per channel, min-max": ours(methods=[]),
    "Slimkit, per channel, repaired": ours(**BEST),
    "Slimkit, per tensor, min-max": ours(granularity="tensor", methods=[]),
    "Slimkit, per tensor, by default": ours(granularity="tensor"),
    "Slimkit, per tensor, repaired": ours(granularity="tensor", **BEST),
    "Slimkit, 4-bit weights per channel": ours(weight_bits=4, methods=[]),
    "Slimkit, 4-bit weights per channel, by default": ours(weight_bits=4),
    "Slimkit, 4-bit weights per channel, no zero points": ours(weight_bits=4, target=SYMMETRIC),
    "Slimkit, 4-bit weights per channel, with mirror images": ours_mirrored,
    "Slimkit, dynamic": ours(mode="dynamic"),
}
if not saturates_int8_pairs():  # on others that is what the rows above are
    OURS |= {
        "Slimkit, per channel, min-max, for AVX2": ours(target="onnxruntime-avx2", methods=[]),
        "Slimkit, per channel, repaired, for AVX2": ours(target="onnxruntime-avx2", **BEST),
    }


def peers(entropy_images: int) -> dict[str, Make]:
    """The peers' rows; on a processor that saturates, as they are and with their remedy."""
    rows = {
        "ORT, min-max, per channel": ort(),
        "ORT, min-max, per tensor": ort(per_channel=False),
        "NNCF": nncf(),
    }
    if saturates_int8_pairs():
        rows |= {
            "ORT, min-max, per channel, reduce_range": ort(reduce_range=True),
            "ORT, min-max, per tensor, reduce_range": ort(per_channel=False, reduce_range=True),
            "NNCF, overflow_fix=enable": nncf(overflow_fix="enable"),
        }
    if entropy_images:
        label = f"ORT, entropy, per channel, {entropy_images} images"
        entropy = ort(method="Entropy", reduce_range=saturates_int8_pairs())

        def make(model: nn.Module, float_file: Path, out: Path, images: Tensor) -> Any:
            return entropy(model, float_file, out, images[:entropy_images])

        rows[label] = make
    return rows


def measure(rows: Mapping[str, Make], out: Path, images: int) -> dict[str, dict[str, float]]:
    """Make what is missing, look at all."""
    model, calibration = network(), calibration_images(images)
    pictures, labels = labelled_images()
    float_file = out / "float.onnx"
    sk.export(model, float_file, calibration[:1], dynamic_batch=True)
    exact = answers(float_file, pictures)
    exact_there = answers(float_file, calibration)
    found: dict[str, dict[str, float]] = {
        "float": {"accuracy": _percent(exact.argmax(1) == labels), "bytes": _size(float_file)}
    }
    for label, make in rows.items():
        slug = re.sub(r"\W+", "_", label)
        record = out / f"{slug}.json"
        kept = json.loads(record.read_text()) if record.exists() else {}
        if not kept:
            file = out / f"{slug}.onnx"
            start = time.perf_counter()
            make(model, float_file, file, calibration)
            seconds = time.perf_counter() - start
            here, there = answers(file, pictures), answers(file, calibration)
            noise = (here - exact).square().sum() / exact.square().sum()
            kept = {
                "label": label,
                "seconds": seconds,
                "accuracy": _percent(here.argmax(1) == labels),
                "agreement": _percent(here.argmax(1) == exact.argmax(1)),
                "calibration_agreement": _percent(there.argmax(1) == exact_there.argmax(1)),
                "sqnr": float(-10 * noise.log10()),
                "bytes": _size(file),
            }
            record.write_text(json.dumps(kept))
            print(kept, flush=True)
        found[label] = kept
    return found


def _percent(equal: Tensor) -> float:
    return 100 * equal.float().mean().item()


def _size(file: Path) -> int:
    return file.stat().st_size


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """One row per file."""
    base = found["float"]["accuracy"]
    rows = []
    for label, r in found.items():
        if label == "float":
            rows.append([label, f"{base:.1f} %", "–", "–", "–", "–", f"{r['bytes'] / 1e6:.2f} MB"])
            continue
        rows.append(
            [
                label,
                f"{r['accuracy']:.1f} %",
                f"{r['accuracy'] - base:+.1f}",
                f"{r['agreement']:.1f} %",
                f"{r['calibration_agreement']:.1f} %",
                f"{r['sqnr']:.1f} dB",
                f"{r['bytes'] / 1e6:.2f} MB",
            ]
        )
    header = ["file", "top-1", "Δ", "agreement", "on the calibration images", "logits", "size"]
    return markdown(header, rows)


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quantize-accuracy")
    parser.add_argument("--images", type=int, default=300, help="to calibrate on")
    parser.add_argument(
        "--entropy-images",
        type=int,
        default=50,
        help="for ONNX Runtime's entropy calibration, which keeps all activations in memory: "
        "about 70 MB an image; 0 leaves it out",
    )
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {**OURS, **({} if options.no_peers else peers(options.entropy_images))}
    found = measure(rows, options.out, options.images)
    page = write_page(
        "quantize_accuracy",
        "What quantization costs in accuracy",
        "python -m benchmarks.quantize_accuracy",
        [
            table(found),
            (__doc__ or "").split("::")[0].partition("\n\n")[2] + ".",
            "One image is 0.5 %. Sums in another order (another processor, more threads) choose "
            "other roundings, and top-1 with 4-bit weights moves by a point or two. *Repaired* is "
            "``methods=['gptq', 'bias_correction']``, which look at 256 of the images; *by "
            "default* they look at 128 per tensor; with 4 bits GPTQ looks behind the activation "
            "functions of 192, and bias tuning at 256. *No zero points* is that with symmetric "
            "levels, *with mirror images* on the 300 images and their mirror images. Slimkit "
            "quantizes for the processor it runs on: without VNNI, sums of two products saturate, "
            "and weights leave room for that; the peers' remedies (``reduce_range``, "
            "``overflow_fix``) are rows of their own.",
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
