"""How many networks can be quantized: torchvision, timm and BERT, each run in ONNX Runtime.

Every torchvision network for classification and segmentation, the smallest network of every timm
module, and a Hugging Face BERT, with seeded random weights, batch norms measured anew on natural
images, and at most 150 M parameters, go through static int8 quantization, export and ONNX
Runtime. A network passes if the file runs, its output is at least 15 dB above its difference from
the float network, and layers left in float have at most 10 % of the MACs of all convolutions and
linear layers. What does not reach 15 dB with the defaults is tried again with ranges by least
squared error, and then with these and a limit on the noise of the outputs on calibration images,
for which some layers stay in float::

    python -m benchmarks.quantize_coverage

Finished networks are kept in ``runs/quantize-coverage``; a second call goes on with the others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import slimkit as sk
from benchmarks.efficientnet_lite0 import calibration_images
from benchmarks.networks import LARGEST, build, names_of, records_of, supervise, work
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.graph.capturing import tensors_in
from slimkit.inputs import Inputs, as_inputs
from slimkit.runtime import export, open_session
from slimkit.train.batch_norm import reestimate_batch_norm

MIN_DB = 15.0
MAX_FLOAT = 0.10
CALIBRATION, CHECKED = 16, 4  # images
SPARE_DB = 0.5  # that the outputs on calibration images must have more than those that are checked
LEVELS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "mse": {"observer": "mse"},
    "mse, limit": {"observer": "mse", "min_sqnr": MIN_DB + SPARE_DB, "fewest": "macs"},
}
"""What is tried one after the other, as keywords of ``ptq``."""
_OTHER_TASKS = ("rcnn", "retinanet", "ssd", "fcos", "raft", "r3d", "mc3", "s3d", "mvit", "swin3d")
_LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d")


def counted(name: str) -> bool:
    """Detection, optical flow and video have benchmarks, or issues, of their own."""
    library, _, rest = name.partition(":")
    return library != "torchvision" or not any(word in rest for word in _OTHER_TASKS)


def calls_of(example: Any) -> list[Inputs]:
    """Calibration images in the network's size, or token ids."""
    inputs = as_inputs(example)
    if "input_ids" in inputs.kwargs:
        ids = inputs.kwargs["input_ids"]
        draw = torch.Generator().manual_seed(2)
        high = 1000
        shapes = range(CALIBRATION)
        return [
            Inputs((), {"input_ids": torch.randint(1, high, ids.shape, generator=draw)})
            for _ in shapes
        ]
    (image,) = inputs.tensors()
    pictures = calibration_images(CALIBRATION)
    resized = nn.functional.interpolate(
        pictures, size=image.shape[-2:], mode="bilinear", antialias=True
    )
    if image.shape[1] != 3:
        resized = resized.mean(1, keepdim=True).expand(-1, image.shape[1], -1, -1)
    return [Inputs((part.contiguous(),)) for part in resized.split(2)]


def measure(name: str) -> dict[str, Any]:
    """Quantize one network, export it, run it."""
    model, example = build(name)
    model.eval()
    params = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {"name": name, "params": params}
    if params > LARGEST:
        return {**record, "status": "larger than 150 M parameters"}
    calls = calls_of(example)
    images = [call.args[0] for call in calls if call.args]
    if images:  # all at once: with statistics of pairs, differences between images add up
        reestimate_batch_norm(model, [torch.cat(images)])
    checked, calibration = calls[: CHECKED // 2], calls[CHECKED // 2 :]
    for level, choices in LEVELS.items():
        record |= {"level": level, **_attempt(model, calls[0], calibration, checked, choices)}
        if record["sqnr"] >= MIN_DB:
            break
    return {**record, "status": verdict(record)}


def _attempt(
    model: nn.Module,
    example: Inputs,
    calibration: list[Inputs],
    checked: list[Inputs],
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """Quantize with these choices, export, compare with the float network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        quantized = sk.quantize.ptq(model, example, calibration=calibration, **choices)
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export(quantized, file, example)
            end = time.perf_counter()
            size = file.stat().st_size
            in_runtime, in_torch = compare(model, quantized, open_session(file, threads=2), checked)
    share, reasons = float_share(model, quantized, example)
    return {
        "quantize": middle - start,
        "export": end - middle,
        "bytes": size,
        "sqnr": in_runtime,
        "sqnr_torch": in_torch,
        "float": share,
        "reasons": reasons,
    }


def compare(model: nn.Module, quantized: nn.Module, session: Any, calls: list[Inputs]) -> Any:
    """DB of the runtime's output, and of PyTorch's, over its difference from the float one."""
    power, runtime_error, torch_error = 0.0, 0.0, 0.0
    for call in calls:
        with torch.no_grad():
            exact = [t for t in tensors_in(call.call(model)) if t.is_floating_point()]
            rounded = [t for t in tensors_in(call.call(quantized)) if t.is_floating_point()]
        outputs = session.run([t.numpy() for t in call.tensors()])
        floats = [torch.from_numpy(np.asarray(o)) for o in outputs if o.dtype.kind == "f"]
        for wanted, here, there in zip(exact, rounded, floats, strict=True):
            power += wanted.double().square().sum().item()
            torch_error += (here - wanted).double().square().sum().item()
            runtime_error += (there - wanted).double().square().sum().item()
    return tuple(10 * np.log10(power / max(e, 1e-30)) for e in (runtime_error, torch_error))


def float_share(model: nn.Module, quantized: Any, example: Inputs) -> tuple[float, dict[str, str]]:
    """Share of the MACs in layers that stay in float, and why each does."""
    macs = {layer.name: layer.macs for layer in sk.profile(model, example).layers}
    layers = [d for d in quantized.plan.decisions if function(d.address) in _LAYERS]
    total = sum(macs.get(d.module, 0) for d in layers) or 1
    left = {d.module: d.reason for d in layers if not d.integer}
    return sum(macs.get(module, 0) for module in left) / total, left


def function(address: str) -> str:
    """The function in ``"module:function#ordinal"``."""
    return address.rpartition(":")[2].partition("#")[0]


def verdict(record: dict[str, Any]) -> str:
    """``passes``, or what is wrong."""
    if not record["sqnr"] >= MIN_DB:
        return f"only {record['sqnr']:.1f} dB (in PyTorch {record['sqnr_torch']:.1f} dB)"
    if record["float"] > MAX_FLOAT:
        why = sorted(set(record["reasons"].values()))
        return f"{100 * record['float']:.0f} % of the MACs in float ({'; '.join(why)})"
    return "passes"


def page(records: list[dict[str, Any]]) -> Path:
    """The table of all networks."""
    measured = [r for r in records if not r["status"].startswith("larger")]
    passed = [r for r in measured if r["status"] == "passes"]
    rows = []
    for r in sorted(measured, key=lambda r: (r["status"] == "passes", r["name"])):
        known = "sqnr" in r
        rows.append(
            [
                r["name"],
                f"{r['params'] / 1e6:.1f} M" if "params" in r else "–",
                r.get("level", "–"),
                f"{r['sqnr']:.1f} dB" if known else "–",
                f"{100 * r['float']:.1f} %" if "float" in r else "–",
                f"{r['bytes'] / 4 / r['params']:.2f}" if known else "–",
                f"{r['quantize']:.1f}" if known else "–",
                f"{r['export']:.1f}" if known else "–",
                r["status"].replace("|", "/").replace("\n", " ")[:200],
            ]
        )
    header = ["network", "parameters", "quantized by", "output", "MACs in float"]
    header += ["file / 4 bytes a parameter", "quantize, s", "export, s", "result"]
    larger = [r["name"] for r in records if r["status"].startswith("larger")]
    counts = {level: sum(r["level"] == level for r in passed) for level in LEVELS}
    by_level = ", ".join(f"{count} by *{level}*" for level, count in counts.items())
    return write_page(
        "quantize_coverage",
        "Which networks can be quantized",
        "python -m benchmarks.quantize_coverage",
        [
            f"**{len(passed)} of {len(measured)} networks pass "
            f"({100 * len(passed) / max(len(measured), 1):.1f} %)**: {by_level}.",
            (__doc__ or "").split("::")[0].partition("\n\n")[2] + ".",
            markdown(header, rows),
            f"{CALIBRATION - CHECKED} calibration images (token ids for BERT), {CHECKED} others "
            "for the comparison, weights per channel. *Defaults* are `ptq(model, example, "
            "calibration=…)` with nothing else: min-max, every layer that can be in integers. "
            '*mse* adds `observer="mse"`, and *limit* '
            f'`min_sqnr={MIN_DB + SPARE_DB:g}, fewest="macs"`; times are those of what is shown '
            "alone. Random weights are harder than trained ones: nothing taught them to keep their "
            "ranges, and batch norms behind a global pooling, measured on 16 images, blow up the "
            "little that differs between these.",
            f"Left out for their size: {', '.join(larger) or 'none'}.",
        ],
    )


def main() -> None:
    """Measure all networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quantize-coverage")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.worker:
        chosen = [n for n in names_of(options.out) if counted(n) and options.only in n]
        work(chosen, options.out, measure)
    else:
        supervise("benchmarks.quantize_coverage")
        print(f"wrote {page(records_of(options.out))}")


if __name__ == "__main__":
    main()
