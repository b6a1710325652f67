"""How many networks can be quantized: torchvision, timm and BERT, each run in ONNX Runtime.

Every torchvision network for classification (of images and videos) and segmentation, the smallest
network of every timm module, and a Hugging Face BERT, with seeded random weights, batch norms
measured anew on natural images, and at most 150 M parameters, go through static int8 quantization,
export and ONNX Runtime. A network passes if the file runs, its output is at least 15 dB above its
difference from the float network, and layers left in float have at most 10 % of the MACs of all
convolutions and linear layers. What does not reach 15 dB with the defaults on 12 calibration
images is tried again with ranges by least squared error, then on 32 images with ranges by
extremes, by least squared error and by the mean of the batches' maxima; with the two kinds of
ranges that suit 12 of them best, with a tenth of the MACs in float; with the better one and
methods beside calibration, too, without equalization and with it; and if all that misses by less
than 1 dB and the network has at most 20 M parameters, by a search for the settings that suit a
quarter of 64 images best. What passes with none of this is shown as it was at its best::

    python -m benchmarks.quantize_coverage

Finished networks are files in ``docs/benchmarks/records/quantize_coverage``; a second call goes on
with the others, and ``--page`` writes the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slimkit as sk
from benchmarks.efficientnet_lite0 import calibration_images
from benchmarks.networks import LARGEST, build, names_of, records_of, shake, supervise, work
from benchmarks.quantize_peers import ort_static
from benchmarks.tables import ROOT, markdown, write_page
from slimkit.graph.capturing import tensors_in
from slimkit.inputs import Inputs, as_inputs
from slimkit.limits import Limit
from slimkit.runtime import export, open_session, parity
from slimkit.runtime.structure import named_feeds
from slimkit.search import Choice, Parameter
from slimkit.train.batch_norm import reestimate_batch_norm, tracking_norms

RECORDS = ROOT / "docs" / "benchmarks" / "records" / "quantize_coverage"
MIN_DB = 15.0
MAX_FLOAT = 0.10
BATCH_NORM, FEW, MANY, CHECKED = 128, 12, 32, 4  # images
CLIPS, PANNED = 16, 2  # for batch norms of videos; pixels from one frame to the next
OBSERVERS = ("minmax", "mse", "mean_of_maxima")
SEARCH = "settings search"
REPAIRED = "a tenth in float and methods"
EQUALIZED = f"{REPAIRED}, equalized first"
METHODS = ("gptq", "bias_correction")
NEARLY, TRIALS, SEARCHED = 14.0, 16, 64  # dB, settings, images
TO_SEARCH = 20e6  # parameters
PROCEDURE = 3
"""Of a record: 3 for what this file does; 2 had other methods; older ones say nothing."""
UNCHANGED = ("defaults", f"{MANY} images, minmax")
"""Attempts that all procedures made in the same way."""
_OTHER_TASKS = ("rcnn", "retinanet", "ssd", "fcos", "raft")
_LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d")


def counted(name: str) -> bool:
    """Detection and optical flow have benchmarks, or issues, of their own."""
    library, _, rest = name.partition(":")
    return library != "torchvision" or not any(word in rest for word in _OTHER_TASKS)


def calls_of(example: Any, count: int = CHECKED + MANY) -> list[Inputs]:
    """Two images each in the network's size, or token ids; the first are those that are checked."""
    inputs = as_inputs(example)
    if "input_ids" not in inputs.kwargs:
        pictures = images_like(inputs.tensors()[0], count)
        return [Inputs((part.contiguous(),)) for part in pictures.split(2)]
    ids = inputs.kwargs["input_ids"]
    draw = torch.Generator().manual_seed(2)
    return [
        Inputs((), {"input_ids": torch.randint(1, 1000, ids.shape, generator=draw)})
        for _ in range(count // 2)
    ]


def images_like(image: Tensor, count: int) -> Tensor:
    """The first calibration images in the size and with the channels of ``image``.

    In front of a network for videos, (N, C, T, H, W), the camera moves across each of them.
    """
    frames = image.shape[2] if image.dim() == 5 else 1
    moved = [PANNED * frame for frame in range(frames)]
    height, width = image.shape[-2:]
    size = height + moved[-1], width + moved[-1]
    pictures = nn.functional.interpolate(
        calibration_images(count), size=size, mode="bilinear", antialias=True
    )
    if image.shape[1] != 3:
        pictures = pictures.mean(1, keepdim=True).expand(-1, image.shape[1], -1, -1)
    if image.dim() != 5:
        return pictures
    return torch.stack([pictures[..., m : m + height, m : m + width] for m in moved], 2)


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """Quantize one network, export it, run it."""
    model, example = build(name)
    model.eval()
    params = sum(p.numel() for p in model.parameters())
    record: dict[str, Any] = {"name": name, "params": params, "procedure": PROCEDURE}
    if params > LARGEST:
        return {**record, "status": "larger than 150 M parameters"}
    calls = calls_of(example)
    checked, calibration = calls[: CHECKED // 2], calls[CHECKED // 2 :]
    _settle(model, example)
    exact = [_floats(call.call(model)) for call in checked]
    if not any(bool(t.any()) for outputs in exact for t in outputs):
        shake(model)  # a head whose training begins with zeros
        _settle(model, example)
        exact = [_floats(call.call(model)) for call in checked]
    macs = {layer.name: layer.macs for layer in sk.profile(model, calls[0]).layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best: tuple[dict[str, Any], sk.quantize.QuantizedModel] | None = None
        for level, quantized in _attempts(model, calls[0], calibration):
            found = [_floats(call.call(quantized)) for call in checked]
            share, left = float_share(macs, quantized)
            attempt: dict[str, Any] = {"level": level, "sqnr_torch": decibels(exact, found)}
            attempt |= {"float": share, "reasons": Counter(left.values())}
            print(f"  {name}, {level}: {attempt['sqnr_torch']:.2f} dB", flush=True)
            if best is None or attempt["sqnr_torch"] > best[0]["sqnr_torch"]:
                best = attempt, quantized
            if attempt["sqnr_torch"] >= MIN_DB:
                attempt |= _exported(quantized, calls[0], checked, exact)
                if verdict(attempt) == "passes":
                    return {**record, **attempt, "status": "passes"}
            nearly = best[0]["sqnr_torch"] >= NEARLY and params <= TO_SEARCH
            if level == EQUALIZED and not nearly:
                break
        assert best is not None
        attempt, quantized = best
        attempt |= _exported(quantized, calls[0], checked, exact)
    return {**record, **attempt, "status": verdict(attempt)}


def _attempts(
    model: nn.Module, example: Inputs, calibration: list[Inputs]
) -> Iterator[tuple[str, sk.quantize.QuantizedModel]]:
    """One quantized network after the other, from the plainest settings on."""
    few = calibration[: FEW // 2]
    yield "defaults", sk.quantize.ptq(model, example, calibration=few)
    yield "mse", sk.quantize.ptq(model, example, calibration=few, observer="mse")
    exact = [_floats(call.call(model)) for call in few]
    reached = {}
    for observer in OBSERVERS:
        quantized = sk.quantize.ptq(model, example, calibration=calibration, observer=observer)
        yield f"{MANY} images, {observer}", quantized
        reached[observer] = decibels(exact, [_floats(call.call(quantized)) for call in few])
    first, second, _ = sorted(reached, key=lambda observer: -reached[observer])
    settings: dict[str, Any] = {"calibration": calibration, "limit": Limit(max_float=MAX_FLOAT)}
    for observer in (first, second):
        quantized = sk.quantize.ptq(model, example, observer=observer, **settings)
        yield f"{observer}, a tenth in float", quantized
        reached[observer] = decibels(exact, [_floats(call.call(quantized)) for call in few])
    better = max((first, second), key=lambda observer: reached[observer])
    settings["observer"] = better
    yield REPAIRED, sk.quantize.ptq(model, example, methods=METHODS, **settings)
    yield EQUALIZED, sk.quantize.ptq(model, example, methods=("equalize", *METHODS), **settings)
    data = calls_of(example, CHECKED + SEARCHED)[CHECKED // 2 :]
    space: dict[str, Parameter] = {"observer": Choice(*OBSERVERS, "percentile")}
    space |= {f"methods.{name}": Choice(False, True) for name in ("equalize", *METHODS)}
    found = sk.quantize.search_settings(
        model, example, calibration=data, space=space, trials=TRIALS, max_float=MAX_FLOAT
    )
    settings = {"calibration": data[: 3 * len(data) // 4], "limit": Limit(max_float=MAX_FLOAT)}
    yield SEARCH, sk.quantize.ptq(model, example, **settings, **found.settings)


def _settle(model: nn.Module, example: Any) -> None:
    """Batch norms with the statistics of many images at once: of a few, differences add up."""
    if tracking_norms(model):
        example = as_inputs(example).tensors()[0]
        images = images_like(example, CLIPS if example.dim() == 5 else BATCH_NORM)
        reestimate_batch_norm(model, [images])


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tensors_in(output) if t.is_floating_point()]


def _exported(
    quantized: nn.Module, example: Inputs, calls: list[Inputs], exact: list[list[Tensor]]
) -> dict[str, Any]:
    """Seconds, bytes, and what comes out in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        start = time.perf_counter()
        export(quantized, file, example)
        seconds, size = time.perf_counter() - start, file.stat().st_size
        session = open_session(file, threads=2)
        outputs = [session.run(named_feeds(call, session.input_names)) for call in calls]
    found = [
        [torch.from_numpy(np.asarray(o)) for o in out if o.dtype.kind == "f"] for out in outputs
    ]
    return {"export": seconds, "bytes": size, "sqnr": decibels(exact, found)}


def decibels(exact: list[list[Tensor]], found: list[list[Tensor]]) -> float:
    """Of the float outputs of all calls over the difference of others from them."""
    power, error = 0.0, 0.0
    for wanted, there in zip(exact, found, strict=True):
        for before, after in zip(wanted, there, strict=True):
            power += before.double().square().sum().item()
            error += (after - before).double().square().sum().item()
    return float(10 * np.log10(power / max(error, 1e-30)))


@torch.no_grad()
def beside_ort(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the dB of the defaults, and of ONNX Runtime's own quantizer."""
    model, example = build(record["name"])
    model.eval()
    _settle(model, example)
    calls = calls_of(example)
    checked, calibration = calls[: CHECKED // 2], calls[CHECKED // 2 :]
    exact = [_floats(call.call(model)) for call in checked]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = sk.quantize.ptq(model, calls[0], calibration=calibration)
        ours = decibels(exact, [_floats(call.call(quantized)) for call in checked])
        files = Path(folder) / "float.onnx", Path(folder) / "ort.onnx"
        export(model, files[0], calls[0])
        ort_static(*files, torch.cat([call.args[0] for call in calibration]))
        session = open_session(files[1], threads=2)
        outputs = [session.run([call.args[0].numpy()]) for call in checked]
    found = [[torch.from_numpy(np.asarray(o)) for o in out] for out in outputs]
    return {**record, "defaults": ours, "ort": decibels(exact, found)}


def float_share(macs: dict[str, int], quantized: Any) -> tuple[float, dict[str, str]]:
    """Share of the MACs in layers that stay in float, and why each does."""
    layers = [d for d in quantized.plan.decisions if function(d.address) in _LAYERS]
    total = sum(macs.get(module, 0) for module in {d.module for d in layers}) or 1
    left = {d.module: d.reason for d in layers if not d.integer}
    return sum(macs.get(module, 0) for module in left) / total, left


def function(address: str) -> str:
    """The function in ``"module:function#ordinal"``."""
    return address.rpartition(":")[2].partition("#")[0]


def verdict(record: dict[str, Any]) -> str:
    """``passes``, or what is wrong."""
    wrong = []
    if not record["sqnr"] >= MIN_DB:
        wrong.append(f"only {record['sqnr']:.1f} dB (in PyTorch {record['sqnr_torch']:.1f} dB)")
    if record["float"] > MAX_FLOAT:
        why = "; ".join(sorted(record["reasons"]))
        wrong.append(f"{100 * record['float']:.0f} % of the MACs in float ({why})")
    return ", ".join(wrong) or "passes"


def compared(record: dict[str, Any]) -> str:
    """What :func:`beside_ort` found."""
    return f"{record['defaults']:.1f}, {record['ort']:.1f} dB" if "ort" in record else "–"


def level_of(record: dict[str, Any]) -> str:
    """The attempt, marked if an older procedure made it."""
    level = str(record.get("level", "–"))
    made = record.get("procedure", 1)
    same = made == PROCEDURE or level in (*UNCHANGED, "–")
    before_methods = record["status"] == "passes" and level not in (REPAIRED, EQUALIZED, SEARCH)
    return level if same or (made == 2 and before_methods) else f"{level} †"


def page(names: list[str], records: list[dict[str, Any]]) -> Path:
    """The table of all networks."""
    known = {r["name"] for r in records}
    missing = [name for name in names if name not in known]
    measured = [r for r in records if not r["status"].startswith("larger")]
    passed = [r for r in measured if r["status"] == "passes"]
    rows = []
    for r in sorted(measured, key=lambda r: (r["status"] == "passes", r["name"])):
        ran = "sqnr" in r
        rows.append(
            [
                r["name"],
                f"{r['params'] / 1e6:.1f} M" if "params" in r else "–",
                level_of(r),
                f"{r['sqnr']:.1f} dB" if ran else "–",
                f"{100 * r['float']:.1f} %" if "float" in r else "–",
                compared(r),
                f"{r['bytes'] / 4 / r['params']:.2f}" if ran else "–",
                f"{r['export']:.1f}" if ran else "–",
                r["status"].replace("|", "/").replace("\n", " ")[:200],
            ]
        )
    header = ["network", "parameters", "quantized by", "output", "MACs in float"]
    header += ["ours by defaults, ORT"]
    header += ["file / 4 bytes a parameter", "export, s", "result"]
    larger = [r["name"] for r in records if r["status"].startswith("larger")]
    counts = Counter(level_of(r) for r in passed)
    older = any(level_of(r).endswith("†") for r in measured)
    counted_in_all = len(measured) + len(missing)
    by_level = ", ".join(f"{count} by *{level}*" for level, count in counts.most_common())
    return write_page(
        "quantize_coverage",
        "Which networks can be quantized",
        "python -m benchmarks.quantize_coverage",
        [
            f"**{len(passed)} of {len(measured)} networks pass "
            f"({100 * len(passed) / max(len(measured), 1):.1f} %)**: {by_level}."
            + (
                f" Of all {counted_in_all}, those included that are not measured yet, that is "
                f"{100 * len(passed) / counted_in_all:.1f} %."
                if missing
                else ""
            ),
            (__doc__ or "").split("::")[0].partition("\n\n")[2] + ".",
            markdown(header, rows),
            f"Batch norms are measured on {BATCH_NORM} images, of networks for videos on {CLIPS} "
            "clips of 16 frames, in which the camera moves across a photograph; "
            f"{CHECKED} images or clips, on which nothing "
            "was calibrated, are for the comparison (token ids for BERT). *Defaults* are "
            f"`ptq(model, example, calibration=…)` with {FEW} images and nothing else: min-max, "
            'weights per channel, every layer that can be in integers. *Mse* is `observer="mse"`, '
            f"*{MANY} images* are that many for calibration, *a tenth in float* on top is "
            f"`limit=Limit(max_float={MAX_FLOAT:g})`, and *methods* are "
            f"`methods={list(METHODS)}`, *equalized first* with `equalize` before them; "
            f"*{SEARCH}* is the best of {TRIALS} trials over observers, these methods and "
            f"`equalize` on {SEARCHED} images. "
            "The machine above wrote the page and measured what is latest; older records are of "
            "others with VNNI. Exports were perhaps timed beside other work. Random weights are "
            "harder than trained ones: nothing taught them to keep their ranges, and batch norms "
            "behind a global pooling blow up the little that differs between images.",
            *(
                [
                    "† The last measurement is by an older procedure: *at least* and *limit* are "
                    '`Limit(min_sqnr=…, fewest="macs")` instead of a share of the MACs; *methods* '
                    "had `equalize` among them, or no attempt with it beside one without, and "
                    "corrected biases also by what may have been chance; or histograms were of all "
                    "values."
                ]
                if older
                else []
            ),
            "*Ours by defaults, ORT*, for networks that fail (`--peer`): with every layer in "
            "integers, by the defaults and by `quantize_static` (min-max, per channel) on the same "
            "images.",
            f"Left out for their size: {', '.join(larger) or 'none'}.",
            *([f"Not measured yet, {len(missing)}: {', '.join(missing)}."] if missing else []),
        ],
    )


def parity_sample(names: list[str], count: int, seed: int) -> None:
    """Print how far exported float files are from their networks, for a seeded sample."""
    for name in sorted(random.Random(seed).sample(names, min(count, len(names)))):
        start = time.perf_counter()
        try:
            model, example = build(name)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                export(model.eval(), file, example)
                told = str(parity(model, file, [example], threads=2))
        except Exception as error:  # one line per network, whatever happens to it
            told = f"{type(error).__name__}: {str(error)[:150]}"
        print(f"{name}: {told}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Measure all networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument(
        "--peer", action="store_true", help="ONNX Runtime's quantizer on networks that fail"
    )
    parser.add_argument("--parity", type=int, help="so many networks, drawn by --seed: floats only")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in names_of(options.out) if counted(name)]
    if options.parity:
        parity_sample(names, options.parity, options.seed)
        return
    if options.worker:
        work([name for name in names if options.only in name], options.out, measure)
        return
    if options.peer:
        for file in sorted(options.out.glob("*_*.json")):
            record = json.loads(file.read_text())
            if "sqnr" in record and record["status"] != "passes" and "ort" not in record:
                file.write_text(json.dumps(beside_ort(record)))
                print(file.stem, compared(json.loads(file.read_text())), flush=True)
    elif not options.page:
        supervise("benchmarks.quantize_coverage")
    print(f"wrote {page(names, records_of(options.out))}")


if __name__ == "__main__":
    main()
