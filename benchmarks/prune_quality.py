"""ResNet-56 on CIFAR-10 with 2.13 times fewer MACs: what is left after six epochs of recovery.

Four arms, each trained on the same images in the same order by the same schedule: the dense
network, ours, Torch-Pruning by group norm, and Torch-Pruning with the distillation that ours has.
The teacher's logits are dumped once per seed for the two distilled arms. Every finished arm is a
JSON file in ``docs/benchmarks/records/prune_quality``, and an interrupted training goes on where it
was, by its checkpoint in ``runs/prune-quality``::

    python -m benchmarks.prune_quality --seeds 0 1

What ``--ours`` should be is chosen on training images, never on the test images; recoveries can be
compared on some that are held out (``--validation 5000``, another ``--out``, which keeps the
records too).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import slimkit as sk
from benchmarks.arms import finished_arms, where
from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.distill import KD
from slimkit.distill.knowledge import Knowledge, KnowledgeDistiller, NetworkTeacher, dump
from slimkit.recipe.stages.interface import StageContext
from slimkit.recipe.stages.pruning import PruneStage
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import ImageSplits, load_data
from slimkit.tasks.data.samples import training_samples
from slimkit.tasks.data.settings import AugmentSettings, DataSettings
from slimkit.train import TrainSettings, fit

DATA = Path(os.environ.get("SLIMKIT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = ROOT / "docs" / "benchmarks" / "records" / "prune_quality"
CHECKPOINT = DATA.parent / "checkpoints" / "resnet56_cifar10.safetensors"
EXAMPLE = torch.zeros(1, 3, 32, 32)
ARMS = {
    "dense": "dense, fine-tuned",
    "ours": "ours",
    "peer": "Torch-Pruning, group norm",
    "peer-distilled": "Torch-Pruning, same distillation",
}
DISTILLED = ("ours", "peer-distilled")
# Of fourteen settings the one with the lowest loss on training images before recovery.
OURS = '{criterion: fpgm, allocation: global, only: ["*.conv1"], round_to: 1}'


def network() -> nn.Module:
    """The trained ResNet-56."""
    from slimkit.models import load_checkpoint

    model = sk.build_model("slimkit:resnet56")
    load_checkpoint(model, CHECKPOINT)
    return model.eval()


def data(options: argparse.Namespace) -> ImageSplits:
    """CIFAR-10, prepared as the checkpoint wants it."""
    return load_data(
        DataSettings(
            source="parquet:cifar10",
            batch_size=128,
            eval_batch_size=500,
            validation=options.validation,
            augment=AugmentSettings(crop=4, flip=True),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            limit=options.limit,
        )
    )


def prune_ours(
    model: nn.Module, splits: ImageSplits, seed: int, options: argparse.Namespace
) -> None:
    """Prune in place, by the settings of a recipe's stage."""
    settings = {"macs": 1 - 1 / options.factor, **yaml.safe_load(options.ours)}
    stage = PruneStage.model_validate(settings)
    work = checkpoint("ours", seed, options).with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    context = StageContext("prune", splits, ClassificationTask(), seed, EXAMPLE, work=work)
    stage.run(model, context)


def prune_peer(model: nn.Module, options: argparse.Namespace) -> None:
    """Prune in place by Torch-Pruning as its CIFAR script does: in small steps, ranked globally."""
    import torch_pruning as tp

    limit = sk.profile(model, EXAMPLE).macs / options.factor
    pruner = tp.pruner.GroupNormPruner(
        model,
        EXAMPLE,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=[model.fc],
    )
    while sk.profile(model, EXAMPLE).macs > limit and pruner.current_step < 400:
        pruner.step()


def taught(splits: ImageSplits, seed: int, options: argparse.Namespace) -> Path:
    """What the unpruned network says about every image of every epoch, for all distilled arms."""
    folder = Path(options.out, f"seed{seed}", "knowledge")
    teacher = NetworkTeacher(
        network(),
        training_samples(splits, seed=seed),
        dtype="float32",
        batch_size=500,
        precision="bf16" if options.precision == "bf16" else "fp32",
        name="unpruned",
    )
    dump(teacher, folder, passes=math.ceil(options.epochs), progress=told)
    return folder


def told(done: int, shards: int) -> None:
    """A line about the teacher's progress."""
    print(f"teacher: {done}/{shards} shards", flush=True)


def train(
    model: nn.Module, splits: ImageSplits, seed: int, arm: str, options: argparse.Namespace
) -> None:
    """Six epochs, with the unpruned network as the teacher in two of the arms."""
    task = ClassificationTask()
    settings = TrainSettings(
        epochs=options.epochs,
        lr=options.lr,
        schedule="one_cycle",
        weight_decay=5e-4,
        precision=options.precision,
    )
    with ExitStack() as stack:
        losses = []
        if arm in DISTILLED:
            knowledge = stack.enter_context(Knowledge([f"file:{taught(splits, seed, options)}"]))
            kd = [KD(temperature=4.0, weight=1.0)]
            term = KnowledgeDistiller(model, knowledge, kd, splits.train)
            losses.append(stack.enter_context(term))
        fit(
            model,
            splits.train,
            loss_fn=task.loss_fn(),
            settings=settings,
            losses=losses,
            checkpoint=checkpoint(arm, seed, options),
            seed=seed,
            label=f"{arm}, seed {seed}",
        )


def checkpoint(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Where the training of an arm stands."""
    return Path(options.out, times(options), f"seed{seed}", f"{arm}.safetensors")


def times(options: argparse.Namespace) -> str:
    """The folder of a factor."""
    return f"{options.factor:g}_times".replace(".", "_")


def run_arm(
    arm: str, seed: int, splits: ImageSplits, options: argparse.Namespace
) -> dict[str, Any]:
    """Prune, train, test."""
    torch.manual_seed(seed)
    task, model = ClassificationTask(), network()
    dense = sk.profile(model, EXAMPLE)
    start = time.perf_counter()
    if arm == "ours":
        prune_ours(model, splits, seed, options)
    elif arm != "dense":
        prune_peer(model, options)
    pruning = time.perf_counter() - start
    images = splits.validation if options.validation else splits.test
    at_once = task.evaluate(model, images)["accuracy"]
    train(model, splits, seed, arm, options)
    costs = sk.profile(model, EXAMPLE)
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings_of(options),
        "accuracy": task.evaluate(model, images)["accuracy"],
        "before_recovery": at_once,
        "macs": costs.macs,
        "params": costs.params,
        "dense_macs": dense.macs,
        "dense_params": dense.params,
        "pruning_seconds": pruning,
    }


def quick(options: argparse.Namespace) -> bool:
    """Whether the run is only a look."""
    return bool(options.limit or options.epochs < 1)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a finished arm must agree in to be used again."""
    names = ("factor", "epochs", "lr", "precision", "ours", "limit", "validation")
    return {name: getattr(options, name) for name in names}


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The record of every arm and seed; those that have none are run."""
    splits = cache(partial(data, options))
    shown = not (options.validation or quick(options))
    records = (RECORDS if shown else options.out) / times(options)

    def run(arm: str, seed: int) -> dict[str, Any]:
        record = run_arm(arm, seed, splits(), options)
        checkpoint(arm, seed, options).unlink(missing_ok=True)
        return record

    def expected(record: dict[str, Any]) -> dict[str, Any]:
        mine = settings_of(options)
        if record["arm"] != "ours":  # what ours was pruned by does not concern the others
            mine["ours"] = record["settings"]["ours"]
        return mine

    return finished_arms(records, options.seeds, options.arms, run, expected)


def table(records: list[dict[str, Any]]) -> str:
    """A row per arm; differences are paired by seed."""
    rows = []
    dense = [r for r in records if r["arm"] == "dense"]
    for arm, title in ARMS.items():
        own = [r for r in records if r["arm"] == arm]
        drop = [r["accuracy"] - d["accuracy"] for r, d in zip(own, dense, strict=True)]
        rows.append(
            [
                title,
                f"{mean_spread([r['dense_macs'] / r['macs'] for r in own])}×",
                mean_spread([r["params"] / 1e3 for r in own], digits=0) + " k",
                mean_spread([r["before_recovery"] for r in own]),
                mean_spread([r["accuracy"] for r in own]),
                "–" if arm == "dense" else mean_spread(drop, sign=True),
            ]
        )
    header = [
        "network",
        "fewer MACs",
        "parameters",
        "before recovery, %",
        "top-1 %",
        "against dense",
    ]
    return markdown(header, rows)


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--factor", type=float, default=2.13, help="fewer MACs, as a ratio")
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--ours", default=OURS, help="settings of a prune stage, as YAML")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prune-quality")
    parser.add_argument("--limit", type=int, help="images per split (quick look)")
    parser.add_argument("--validation", type=int, default=0, help="images held out, to choose by")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    options = parser.parse_args()
    records = finished(options)
    if options.validation or set(options.arms) < set(ARMS):
        return  # to choose by, not to show
    page = write_page(
        "prune_quality" + ("_quick" if quick(options) else f"_{times(options)}"),
        f"ResNet-56 on CIFAR-10, {options.factor:g} times fewer MACs",
        f"python -m benchmarks.prune_quality --seeds {' '.join(map(str, options.seeds))} "
        f"--factor {options.factor:g} --epochs {options.epochs:g} --lr {options.lr:g} "
        f"--precision {options.precision} --ours '{options.ours}'",
        [
            table(records),
            f"Mean over the seeds (lowest … highest); {options.epochs:g} epochs, SGD with Nesterov "
            f"momentum, one cycle up to {options.lr:g}, batch 128, crop and flip, "
            f"{options.precision}; the same images in the same order for all arms of a seed. "
            "*Ours* and *same distillation* add KD (temperature 4, weight 1) from the unpruned "
            "network, whose logits were dumped once: these two arms share their crops and flips, "
            "the others share theirs. Accuracy on the 10,000 test images in PyTorch, looked at "
            "before and after recovery and for nothing else; before it, ours has measured its "
            "batch-norm statistics anew. The images are JPEG re-encodings, on which the "
            "checkpoint has 89.5 %.",
            where(records),
        ],
    )
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
