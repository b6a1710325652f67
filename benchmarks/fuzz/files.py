"""Damaged files: everything that Slimkit reads, changed at random.

A kind of file is made once, in good order. A case copies it, damages one of its files and uses it
as a user would. Files that carry a checksum must either be refused or give what the undamaged ones
give; of the others (annotations, reports, plain checkpoints) every value may be meant.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import slimkit as sk
from benchmarks.fuzz.mutations import damaged_bytes, damaged_text
from benchmarks.fuzz.outcomes import Case
from slimkit.artifact import read_json, tensors_hash

__all__ = ["KINDS", "cases"]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        make: writes it into a folder, in good order.
        use: reads it as a user would, and returns what came of it, comparable by ``==``.
        sealed: whether every change has to be noticed.
        targets: patterns of the files that are damaged.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path], object]
    sealed: bool
    targets: tuple[str, ...] = ("**/*",)


def network() -> nn.Sequential:
    """Small, and always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(),
        nn.Linear(288, 10),
    ).eval()  # fmt: skip


EXAMPLE = torch.ones(2, 1, 8, 8)


def _state(model: nn.Module) -> str:
    return tensors_hash(
        {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    )


def _plan(make: Callable[[nn.Module], sk.Plan]) -> tuple[Callable[[Path], None], Any]:
    def write(folder: Path) -> None:
        make(network()).save(folder / "plan.json")

    def use(folder: Path) -> object:
        return _state(sk.apply(network(), sk.Plan.load(folder / "plan.json")))

    return write, use


def _quantized(model: nn.Module) -> Any:
    return sk.quantize.ptq(model, EXAMPLE, calibration=[EXAMPLE])


def _write_saved(folder: Path) -> None:
    model = network()
    sk.apply(model, sk.prune.plan(model, EXAMPLE, ratio=0.5, round_to=1))
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.5))
    sk.save(_quantized(model), folder / "saved")


def _write_packed(folder: Path) -> None:
    from slimkit.runtime.packed_weights import write_packed

    model = network()
    sk.apply(model, sk.sparsify.plan(model, sparsity=0.75))
    write_packed(folder / "w.safetensors", model.state_dict())


def _read_packed(folder: Path) -> object:
    from slimkit.runtime.packed_weights import read_packed

    return tensors_hash(read_packed(folder / "w.safetensors"))


def _write_checkpoints(folder: Path) -> None:
    from slimkit.artifact import write_tensors

    write_tensors(folder / "w.safetensors", network().state_dict())
    torch.save({"state_dict": network().state_dict()}, folder / "w.pth")


def _load_checkpoints(folder: Path) -> object:
    from slimkit.models import load_checkpoint

    for name in ("w.safetensors", "w.pth"):
        load_checkpoint(network(), folder / name)
    return None


def _write_report(folder: Path) -> None:
    variants = [
        {
            "name": name,
            "metrics": {"accuracy": score},
            "cost": {"params": 100, "macs": 1000, "bytes": 4000, "weight_bytes": 400},
            "latency": [
                {"backend": "onnxruntime", "threads": 1, "batch": 1, "median_ms": ms, "p90_ms": ms}
            ],
            "files": {"model": f"variants/{name}/model.onnx"},
            "stages": [{"name": "train", "type": "train", "seconds": 1.0, "cached": False,
                        "settings": {"epochs": 2}, "history": [{"epoch": 0, "loss": 1.0}]}],
        }
        for name, score, ms in (("baseline", 90.0, 2.0), ("small", 89.0, 1.0))
    ]  # fmt: skip
    report = {
        "schema_version": 1,
        "name": "run",
        "seed": 0,
        "environment": {},
        "variants": variants,
    }
    (folder / "report.json").write_text(json.dumps(report))


def _draw_report(folder: Path) -> object:
    from slimkit.report import compare
    from slimkit.report.rendering import build_html

    build_html(read_json(folder / "report.json"))
    return compare(folder, folder).markdown()


def _write_coco(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images = []
        (folder / "images" / split).mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        for number in range(3):
            picture = Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
            picture.save(folder / "images" / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 32, "height": 32})
        boxes = [
            {"id": n, "image_id": n % 3, "category_id": 7, "bbox": [2, 3, 10, 9], "area": 90,
             "iscrowd": 0}
            for n in range(4)
        ]  # fmt: skip
        content = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "x"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _read_scenes(kind: str) -> Callable[[Path], object]:
    def use(folder: Path) -> object:
        from slimkit.tasks import TASKS

        task = TASKS.get("detection").model_validate({})
        settings = task.data_settings.model_validate(
            {"source": f"{kind}:{folder}", "image_size": 32, "batch_size": 2, "eval_batch_size": 2}
        )
        splits = task.load(settings)
        for loader in (splits.train, splits.test):
            for _ in loader:
                pass
        return None

    return use


def _write_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for number in range(3):
                kind = ("png", "jpg", "bmp")[number]
                picture = Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8))
                picture.save(folder / split / label / f"{number}.{kind}")


def _write_parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def png(value: int) -> bytes:
        held = io.BytesIO()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(held, "PNG")
        return held.getvalue()

    rows = [{"image": {"bytes": png(n), "path": None}, "label": n % 2} for n in range(12)]
    for split in ("train", "test"):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")


def _read_images(kind: str) -> Callable[[Path], object]:
    def use(folder: Path) -> object:
        from slimkit.tasks.data.loading import load_data
        from slimkit.tasks.data.settings import DataSettings

        settings = DataSettings(source=f"{kind}:{folder}", batch_size=2, validation=2, image_size=8)
        splits = load_data(settings)
        for loader in (splits.train, splits.test):
            for _ in loader:
                pass
        return None

    return use


def _write_onnx(folder: Path) -> None:
    preprocessing = {"mean": [0.5], "std": [0.5], "scale": 255, "layout": "NCHW", "size": [8, 8],
                     "channels": 1}  # fmt: skip
    metadata = {
        "slimkit.preprocessing": json.dumps(preprocessing),
        "slimkit.classes": json.dumps(list("abcdefghij")),
    }
    sk.export(network(), folder / "m.onnx", EXAMPLE, metadata=metadata)


def _use_onnx(folder: Path) -> object:
    from slimkit.measure.onnx_profile import profile_file
    from slimkit.runtime import fusion_report

    profile_file(folder / "m.onnx")
    fusion_report(folder / "m.onnx")
    sk.benchmark(folder / "m.onnx", runs=1, warmup=0)
    return None


def _write_training(folder: Path) -> None:
    _train(folder, stop=True)


def _train(folder: Path, *, stop: bool) -> str:
    from torch.utils.data import DataLoader, TensorDataset

    from slimkit.train import Callback, TrainSettings, fit

    class Stop(Callback):
        def on_epoch_end(self, context: Any) -> None:
            if context.epoch == 1:
                raise KeyboardInterrupt

    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.arange(16) % 4), 8)
    model = network()
    with contextlib.suppress(KeyboardInterrupt):
        fit(
            model,
            loader,
            loss_fn=nn.functional.cross_entropy,
            settings=TrainSettings(
                epochs=3, lr=0.01, ema=0.9, precision="fp32", channels_last=False
            ),
            callbacks=[Stop()] if stop else [],
            checkpoint=folder / "run.safetensors",
            progress=False,
        )
    return _state(model)


_KNOWLEDGE_SAMPLES = 12


def _samples() -> Any:
    from slimkit.tasks.data.loading import load_data
    from slimkit.tasks.data.samples import training_samples
    from slimkit.tasks.data.settings import DataSettings

    settings = DataSettings(limit=_KNOWLEDGE_SAMPLES, batch_size=4, validation=0)
    return training_samples(load_data(settings))


def _write_knowledge(folder: Path) -> None:
    from slimkit.distill.knowledge import NetworkTeacher, dump

    dump(NetworkTeacher(network(), _samples()), folder / "known", shard_rows=8)
    np.save(folder / "ids.npy", _samples().ids.numpy())


def _read_knowledge(folder: Path) -> object:
    from slimkit.distill.knowledge import KnowledgeFiles

    files = KnowledgeFiles(folder / "known")
    files.verify()
    return tensors_hash(files.rows(np.load(folder / "ids.npy"), 0))


_prune = _plan(lambda model: sk.prune.plan(model, EXAMPLE, ratio=0.5, round_to=1))
_mask = _plan(lambda model: sk.sparsify.plan(model, sparsity=0.5))
_scheme = _plan(lambda model: _quantized(model).plan)
KINDS = (
    Kind("pruning plan", *_prune, sealed=True),
    Kind("mask plan", *_mask, sealed=True),
    Kind("quantization plan", *_scheme, sealed=True),
    Kind(
        "saved folder",
        _write_saved,
        lambda folder: _state(sk.load(folder / "saved", network())),
        sealed=True,
    ),
    Kind("packed weights", _write_packed, _read_packed, sealed=True),
    Kind("checkpoint of weights", _write_checkpoints, _load_checkpoints, sealed=False),
    Kind("checkpoint of a training", _write_training, lambda folder: _train(folder, stop=False),
         sealed=False),
    Kind("knowledge of a teacher", _write_knowledge, _read_knowledge, sealed=True,
         targets=("known/*",)),
    Kind("report", _write_report, _draw_report, sealed=False),
    Kind("ONNX file", _write_onnx, _use_onnx, sealed=False),
    Kind("COCO annotations", _write_coco, _read_scenes("coco"), sealed=False,
         targets=("annotations/*",)),
    Kind("image folder", _write_pictures, _read_images("imagefolder"), sealed=False),
    Kind("Parquet images", _write_parquet, _read_images("parquet"), sealed=False),
)  # fmt: skip


class Stock:
    """Every kind of file, made once, and what it gives in good order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, object] = {}
        for number, kind in enumerate(KINDS):
            place = folder / str(number)
            place.mkdir(parents=True)
            kind.make(place)
            copied = folder / f"used-{number}"
            shutil.copytree(place, copied)
            self.expected[kind.name] = kind.use(copied)
            shutil.rmtree(copied)


def cases(seed: int, count: int, folder: Path) -> Iterator[Case]:
    """``count`` cases, the same for the same seed.

    Args:
        seed: of kinds, files and damage.
        count: how many.
        folder: for the files; emptied by the caller.
    """
    stock = Stock(folder / "stock")
    numbers = random.Random(seed)
    for number in range(count):
        index = number % len(KINDS)
        yield _case(number, index, stock, random.Random(numbers.random()))


def _case(number: int, index: int, stock: Stock, numbers: random.Random) -> Case:
    kind = KINDS[index]
    source = stock.folder / str(index)
    files = sorted(p for pattern in kind.targets for p in source.glob(pattern) if p.is_file())
    target = numbers.choice(files).relative_to(source)

    def act() -> object:
        with tempfile.TemporaryDirectory(dir=stock.folder) as place:
            folder = Path(place) / "case"
            shutil.copytree(source, folder)
            content = (folder / target).read_bytes()
            text = target.suffix in {".json", ".txt", ".xml"}
            damaged = (
                damaged_text(content.decode(errors="replace"), numbers)
                if text
                else damaged_bytes(content, numbers)
            )
            (folder / target).write_bytes(damaged)
            before = _others(folder, target)
            try:
                return kind.use(folder)
            finally:
                lost = [
                    name
                    for name, sum_ in before.items()
                    if _others(folder, target).get(name) != sum_
                ]
                if lost and kind.name != "checkpoint of a training":
                    raise FileLostError(f"{kind.name}: {lost[0]}")

    expected = stock.expected[kind.name]
    judge = (lambda found: found == expected) if kind.sealed else None
    return Case(f"{kind.name} #{number}: {target}", act, judge)


class FileLostError(Exception):
    """Reading changed or removed a file that nobody damaged."""


def _others(folder: Path, target: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder) != target
    }
