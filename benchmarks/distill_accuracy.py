"""MobileNetV1×0.5 on CIFAR-10 with and without a ResNet-56 as its teacher, three paired seeds.

The first part of the training is the same for the three arms of a seed: without a teacher, with
Slimkit's losses, with torchdistill's of the same names and weights. So are images, their order and
the schedule of the second part. Every finished arm is a JSON file in ``runs/distill-accuracy``, and
an interrupted training goes on where it was::

    python -m benchmarks.distill_accuracy
"""

from __future__ import annotations

import argparse
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import slimkit as sk
from benchmarks.arms import finished_arms
from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.distill import KD, Distiller, Mimic
from slimkit.models import load_checkpoint
from slimkit.tasks import ClassificationTask
from slimkit.tasks.data import Splits, load_data
from slimkit.tasks.data.settings import AugmentSettings, DataSettings
from slimkit.train import StepContext, TrainSettings, fit

DATA = Path(os.environ.get("SLIMKIT_DATA", ROOT.parent / "shared" / "data"))
CHECKPOINT = DATA.parent / "checkpoints" / "resnet56_cifar10.safetensors"
EXAMPLE = torch.zeros(2, 3, 32, 32)
ARMS = {"plain": "no teacher", "ours": "Slimkit", "peer": "torchdistill"}
# Chosen for recipes/cifar10/mobilenet_v1.yaml on training images that were held out.
TEMPERATURE, FEATURES, LABELS = 4.0, 3.0, 0.1
LAYER, TEACHER_LAYER = "blocks.10", "layer3"


class PeerDistiller(nn.Module):
    """torchdistill's hooks, ``KDLoss`` and ``MSELoss`` behind a 1×1 regressor, as one loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        from torchdistill.core.forward_hook import ForwardHookManager
        from torchdistill.losses.high_level import WeightedSumLoss

        super().__init__()
        self._teacher = [teacher.eval()]  # in a list: its weights are not ours to train
        self._records = []
        widths = []
        for network, layer in ((student, LAYER), (teacher, TEACHER_LAYER)):
            hooks = ForwardHookManager(torch.device("cpu"))
            hooks.add_hook(network, layer, requires_input=False, requires_output=True)
            with torch.no_grad():
                network(EXAMPLE)
            widths.append(hooks.pop_io_dict()[layer]["output"].shape[1])
            self._records.append(hooks)
        self.regressor = nn.Conv2d(widths[0], widths[1], 1)
        logits = {"module_path": ".", "module_io": "output"}
        roles = [f"{role}_{key}" for role in ("student", "teacher") for key in logits]
        kd = dict(zip(roles, [*logits.values(), *logits.values()], strict=True))
        side = {"module_path": "features", "io": "output"}
        terms = {
            "kd": {
                "criterion": {
                    "key": "KDLoss",
                    "kwargs": {**kd, "temperature": TEMPERATURE, "alpha": 0.0, "beta": 1.0},
                },
                "weight": 1.0,
            },
            "features": {
                "criterion": {"key": "MSELoss", "kwargs": {}},
                "criterion_wrapper": {
                    "key": "SimpleLossWrapper",
                    "kwargs": {
                        "input": {"is_from_teacher": False, **side},
                        "target": {"is_from_teacher": True, **side},
                    },
                },
                "weight": FEATURES,
            },
        }
        self._loss = WeightedSumLoss(sub_terms=terms)

    def forward(self, context: StepContext) -> Tensor:
        """The weighted sum for one step, whose labels the loop adds itself."""
        with torch.no_grad():
            scores = self._teacher[0](context.inputs)
        mine, theirs = (hooks.pop_io_dict() for hooks in self._records)
        io = {
            "student": {
                ".": {"output": context.outputs},
                "features": {"output": self.regressor(mine[LAYER]["output"])},
            },
            "teacher": {
                ".": {"output": scores},
                "features": {"output": theirs[TEACHER_LAYER]["output"]},
            },
        }
        return torch.as_tensor(self._loss(io, {}, context.targets))


def data(options: argparse.Namespace) -> Splits:
    """CIFAR-10 as the teacher's checkpoint wants it."""
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


def student() -> nn.Module:
    """MobileNetV1×0.5 for small images, untrained."""
    return sk.build_model("slimkit:mobilenet_v1", num_classes=10, width=0.5, stem="cifar")


def teacher() -> nn.Module:
    """The trained ResNet-56."""
    network = sk.build_model("slimkit:resnet56")
    load_checkpoint(network, CHECKPOINT)
    return network.eval()


def begun(seed: int, splits: Splits, options: argparse.Namespace) -> nn.Module:
    """The student after the part that all arms of a seed share."""
    torch.manual_seed(seed)
    model = student()
    file = options.out / f"seed{seed}" / "begun.safetensors"
    if file.exists():
        load_model(model, str(file))
        return model
    file.parent.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        splits.train,
        loss_fn=ClassificationTask().loss_fn(),
        settings=TrainSettings(
            epochs=options.begin, lr=0.1, schedule="constant", warmup_epochs=0.5, image_size=20
        ),
        checkpoint=file.with_name("begin.checkpoint.safetensors"),
        seed=seed,
        label=f"begin, seed {seed}",
    )
    save_model(model, str(file))
    file.with_name("begin.checkpoint.safetensors").unlink(missing_ok=True)
    return model


def run_arm(arm: str, seed: int, splits: Splits, options: argparse.Namespace) -> dict[str, Any]:
    """Train the second part, then test once."""
    task, model = ClassificationTask(), begun(seed, splits, options)
    losses: list[Any] = []
    if arm == "ours":
        chosen = [
            KD(temperature=TEMPERATURE),
            Mimic(student=LAYER, teacher=TEACHER_LAYER, weight=FEATURES),
        ]
        losses.append(Distiller(model, teacher(), chosen, example_inputs=EXAMPLE, precision="fp32"))
    elif arm == "peer":
        losses.append(PeerDistiller(model, teacher()))
    history = fit(
        model,
        splits.train,
        loss_fn=task.loss_fn(),
        settings=TrainSettings(
            epochs=options.epochs, lr=0.1, schedule="cosine", warmup_epochs=0.2,
            loss_weight=LABELS if losses else 1.0,
        ),
        losses=losses,
        checkpoint=options.out / f"seed{seed}" / f"{arm}.safetensors",
        seed=seed,
        label=f"{arm}, seed {seed}",
    )  # fmt: skip
    images = splits.validation if options.validation else splits.test
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings_of(options),
        "accuracy": task.evaluate(model, images)["accuracy"],
        "training_seconds": history.seconds,
    }


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a finished arm must agree in to be used again."""
    return {name: getattr(options, name) for name in ("begin", "epochs", "limit", "validation")}


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The record of every arm and seed; those that have none are run."""
    splits = cache(partial(data, options))

    def run(arm: str, seed: int) -> dict[str, Any]:
        return run_arm(arm, seed, splits(), options)

    settings = settings_of(options)
    return finished_arms(options.out, options.seeds, ARMS, run, lambda _: settings)


def table(records: list[dict[str, Any]]) -> str:
    """A row per arm; gains are paired by seed."""
    rows = []
    plain = [record for record in records if record["arm"] == "plain"]
    for arm, title in ARMS.items():
        own = [record for record in records if record["arm"] == arm]
        gain = [mine["accuracy"] - base["accuracy"] for mine, base in zip(own, plain, strict=True)]
        rows.append(
            [
                title,
                mean_spread([record["accuracy"] for record in own]),
                "–" if arm == "plain" else mean_spread(gain, sign=True),
                "–" if arm == "plain" else ", ".join(f"{value:+.2f}" for value in gain),
                mean_spread([record["training_seconds"] / 60 for record in own], digits=1) + " min",
            ]
        )
    return markdown(["teacher's losses", "top-1 %", "gain", "by seed", "second part"], rows)


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--begin", type=float, default=8.0, help="epochs that all arms share")
    parser.add_argument("--epochs", type=float, default=6.0, help="epochs of the second part")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "distill-accuracy")
    parser.add_argument("--limit", type=int, help="images per split (quick look; writes no page)")
    parser.add_argument("--validation", type=int, default=0, help="images held out, to choose by")
    options = parser.parse_args()
    shown = table(finished(options))
    if options.validation or options.limit:
        print(shown)
        return
    page = write_page(
        "distill_accuracy",
        "MobileNetV1 on CIFAR-10, with and without a teacher",
        f"python -m benchmarks.distill_accuracy --seeds {' '.join(map(str, options.seeds))} "
        f"--begin {options.begin:g} --epochs {options.epochs:g}",
        [
            shown,
            f"Mean over the seeds (lowest … highest). {options.begin:g} epochs on 20-pixel images "
            "at a constant rate of 0.1 are shared by the three arms of a seed; then "
            f"{options.epochs:g} epochs on whole images, cosine from 0.1, batch 128, crop and "
            "flip, the same images in the same order. Teacher: the ResNet-56 of "
            f"`shared/checkpoints`. Losses of both tools: KD at temperature {TEMPERATURE:g}, "
            f"weight 1; squared difference of `{LAYER}`, through a 1×1 convolution, to the "
            f"teacher's `{TEACHER_LAYER}`, weight {FEATURES:g}; labels at {LABELS:g}. torchdistill "
            "gives hooks and losses, the training loop is ours. Accuracy on the 10,000 test "
            "images, which are JPEG re-encodings, looked at once.",
        ],
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
