"""PicoDet-S with its published weights in int8 on coco128: accuracy, size and speed.

Our float export beside the shipped file, our int8 files beside ONNX Runtime's ``quantize_static``,
all run by ONNX Runtime; calibrated on coco128's training images, judged on its validation images::

    python -m benchmarks.detection_int8 picodet_s_320_coco.onnx

The data set is looked for under ``$SLIMKIT_DATA``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slimkit as sk
from benchmarks.picodet_weights import load_folded
from benchmarks.quantize_peers import ort_static
from benchmarks.tables import markdown, write_page
from slimkit.inputs import Inputs
from slimkit.measure.latency import benchmark_interleaved
from slimkit.models.picodet import picodet_s
from slimkit.runtime import fusion_report, open_session
from slimkit.tasks.detection.settings import DetectionDataSettings
from slimkit.tasks.detection.task import DetectionTask
from slimkit.tasks.running import session_run
from slimkit.tasks.splits import Splits, first_batches

SIZE = 320
HEAD = "head.outputs.*"
"""The 1×1 convolutions that give scores and distances together, whose ranges differ most."""


def without_inputs(source: Path, target: Path) -> Path:
    """The shipped file with its initialisers taken off the graph's inputs, as a runtime needs."""
    import onnx

    model = onnx.load(str(source))
    held = {entry.name for entry in model.graph.initializer}
    kept = [entry for entry in model.graph.input if entry.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.save(model, str(target))
    return target


def shipped_answers(path: Path, task: DetectionTask) -> Callable[[Inputs], Any]:
    """The shipped file's outputs, decoded as ours: scores and distances of four levels."""
    run, network = session_run(open_session(path)), picodet_s()

    def answer(inputs: Inputs) -> Any:
        outputs = list(run(inputs).values())
        scores, distances = torch.cat(outputs[:4], 1), torch.cat(outputs[4:], 1)
        boxes, _ = network.decode((torch.zeros(1), distances), (SIZE, SIZE))  # type: ignore[arg-type]
        return task.complete({"boxes": boxes, "scores": scores}, inputs)

    return answer


def one_by_one(answer: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """For files of a fixed batch."""
    return lambda inputs: [found for part in inputs.split(1) for found in answer(part)]


def file_answers(path: Path, task: DetectionTask) -> Callable[[Inputs], Any]:
    """A file of ours."""
    run = session_run(open_session(path))
    return lambda inputs: task.complete(run(inputs), inputs)


def made_files(
    task: DetectionTask, splits: Splits, source: Path, folder: Path, images: Tensor
) -> dict[str, Path]:
    """The files that are compared, by name."""
    model = picodet_s()
    load_folded(model, source)
    model.eval()
    files = {"shipped": without_inputs(source, folder / "shipped.onnx")}
    names = dict(task.export_options(splits))
    example = images[:1]

    def export(name: str, network: torch.nn.Module) -> None:
        files[name] = folder / f"{name.replace(' ', '_').replace(',', '')}.onnx"
        sk.export(task.exported(network, splits), files[name], example, **names)

    export("float", model)
    batches = images.split(8)
    for name, skip in (("int8", ()), ("int8, head in float", (HEAD,))):
        export(name, sk.quantize.ptq(model, example, calibration=batches, skip=skip))
    files["quantize_static"] = ort_static(files["float"], folder / "peer.onnx", images)
    return files


def main() -> None:
    """Make the files, judge and time them, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="picodet_s_320_coco.onnx")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default: 3)")
    chosen = parser.parse_args()
    task = DetectionTask()
    settings = DetectionDataSettings(
        source="coco:coco128", image_size=SIZE, validation=0, eval_batch_size=8
    )
    splits = task.load(settings)
    images = torch.cat([b.inputs.args[0] for b in first_batches(splits.calibration, 8)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = made_files(task, splits, chosen.source, folder, images)
        rows: list[list[object]] = []
        rounds = [
            benchmark_interleaved(files, threads=1, seconds=2.0) for _ in range(chosen.repeats)
        ]
        for label, path in files.items():
            answers = (
                one_by_one(shipped_answers(path, task))
                if label == "shipped"
                else file_answers(path, task)
            )
            scores = task.evaluate(answers, splits.test)
            times = sorted(found[label].median_ms for found in rounds)
            ratios = sorted(f["float"].median_ms / f[label].median_ms for f in rounds)
            convs = "–" if label in {"shipped", "float"} else str(fusion_report(path))
            rows.append(
                [
                    label,
                    f"{scores['map']:.2f}",
                    f"{scores['map50']:.2f}",
                    f"{path.stat().st_size / 1e6:.2f}",
                    f"{times[len(times) // 2]:.2f}",
                    f"{ratios[len(ratios) // 2]:.2f}×",
                    convs,
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    header = ["file", "mAP", "AP50", "MB", "ms, 1 thread", "against float", "in the runtime"]
    write_page(
        "detection_int8",
        "PicoDet-S in int8 on coco128",
        "python -m benchmarks.detection_int8 picodet_s_320_coco.onnx",
        [
            "128 validation images at 320×320, scores from 0.025, suppression at IoU 0.6, at most "
            "100 boxes; calibrated on 64 training images. *shipped* is the published file with its "
            "initialisers taken off the inputs; it leaves decoding of boxes to the caller, ours "
            "do it inside.",
            markdown(header, rows),
        ],
    )


if __name__ == "__main__":
    main()
