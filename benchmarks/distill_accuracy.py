"""MobileNetV1×0.5 on CIFAR-10 with and without a ResNet-56 as its teacher, three paired seeds.

Baseline and distilled network are those of ``recipes/cifar10/mobilenet_v1.yaml``, from the cache
where that recipe was run; a third network learns by torchdistill's hooks and losses, of the same
names and weights. The first part of the training is the same for the three, and so are images,
their order and the schedule of the second part. Every finished arm is a JSON file in
``docs/benchmarks/records/distill_accuracy``, finished stages are cached, and an interrupted
training goes on where it was::

    python -m benchmarks.distill_accuracy
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import slimkit as sk
from benchmarks.arms import finished_arms, where
from benchmarks.mobilenet import RECIPE, variation
from benchmarks.tables import ROOT, markdown, mean_spread, write_page
from slimkit.models import load_checkpoint
from slimkit.recipe import Recipe, load_recipe, run_recipe
from slimkit.recipe.stages.interface import STAGES, StageContext, StageResult
from slimkit.recipe.stages.training import TrainStage, train_model, training_facts
from slimkit.train import StepContext

DATA = Path(os.environ.get("SLIMKIT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = ROOT / "docs" / "benchmarks" / "records" / "distill_accuracy"
CHECKPOINT = DATA.parent / "checkpoints" / "resnet56_cifar10.safetensors"
EXAMPLE = torch.zeros(2, 3, 32, 32)
ARMS = {"plain": "no teacher", "ours": "Slimkit", "peer": "torchdistill"}
# As in the recipe, where they were chosen on training images that were held out.
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


def teacher() -> nn.Module:
    """The trained ResNet-56."""
    network = sk.build_model("slimkit:resnet56")
    load_checkpoint(network, CHECKPOINT)
    return network.eval()


@STAGES.register("train_by_torchdistill")
class PeerStage(TrainStage):
    """A train stage whose losses beside the task's are torchdistill's."""

    type: Literal["train_by_torchdistill"] = "train_by_torchdistill"  # type: ignore[assignment]

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        term = PeerDistiller(model, teacher())
        return StageResult(
            model, training_facts(train_model(model, self, self, context, terms=[term]))
        )


def recipe_of(seed: int, arms: Sequence[str], options: argparse.Namespace) -> Recipe:
    """One variant per arm."""
    second = load_recipe(RECIPE).model_dump(mode="json")["stages"]["train"]
    peer = {**second, "type": "train_by_torchdistill", "loss_weight": LABELS}
    if options.epochs is not None:
        peer["epochs"] = options.epochs
    chains = {
        "plain": ("begin", "train"),
        "ours": ("begin", "distil"),
        "peer": ("begin", "peer"),
    }
    return variation(
        "distill-accuracy",
        seed,
        {arm: chains[arm] for arm in arms},
        {"peer": peer},
        limit=options.limit,
        epochs=options.epochs,
    )


def settings_of(arm: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a finished arm must agree in to be used again: the settings that are not defaults."""
    recipe = recipe_of(0, [arm], options)
    parts = {"data": recipe.data, "model": recipe.model, **recipe.stages}
    return {
        name: part.model_dump(mode="json", exclude_defaults=True) for name, part in parts.items()
    }


def finished(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The record of every arm and seed; those that have none are run."""
    looked = options.limit is not None or options.epochs is not None
    folder = options.out / "records" if looked else RECORDS

    def run(arm: str, seed: int) -> dict[str, Any]:
        out = options.out / f"seed{seed}" / arm
        (variant,) = run_recipe(recipe_of(seed, [arm], options), out)["variants"]
        seconds = sum(epoch["seconds"] for epoch in variant["stages"][-1]["history"])
        return {
            "arm": arm,
            "seed": seed,
            "settings": settings_of(arm, options),
            "accuracy": variant["torch_metrics"]["accuracy"],
            "minutes": seconds / 60,
        }

    def expected(record: dict[str, Any]) -> dict[str, Any]:
        return settings_of(record["arm"], options)

    return finished_arms(folder, options.seeds, options.arms, run, expected)


def table(records: list[dict[str, Any]]) -> str:
    """A row per arm; gains are paired by seed."""
    by_arm = {arm: [r for r in records if r["arm"] == arm] for arm in ARMS}
    rows = []
    for arm, own in by_arm.items():
        if not own:
            continue
        gain = [r["accuracy"] - p["accuracy"] for r, p in zip(own, by_arm["plain"], strict=True)]
        plain = arm == "plain"
        rows.append(
            [
                ARMS[arm],
                mean_spread([r["accuracy"] for r in own]),
                "–" if plain else mean_spread(gain, sign=True),
                "–" if plain else ", ".join(f"{value:+.2f}" for value in gain),
                ", ".join(f"{r['minutes']:.0f}" for r in own),
            ]
        )
    header = ["teacher's losses", "top-1 %", "gain", "by seed", "minutes of the second part"]
    return markdown(header, rows)


def main() -> None:
    """Run what is missing and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "distill-accuracy")
    parser.add_argument("--train", action="store_true", help="run what is missing, write no page")
    parser.add_argument("--epochs", type=float, help="of every training (quick look)")
    parser.add_argument("--limit", type=int, help="images per split (quick look)")
    options = parser.parse_args()
    if "plain" not in options.arms and not options.train:
        parser.error("every gain is against the arm plain")
    records = finished(options)
    if options.train:
        return
    shown = table(records)
    if options.limit or options.epochs is not None:
        print(shown)
        return
    first, second = (load_recipe(RECIPE).stages[name] for name in ("begin", "train"))
    page = write_page(
        "distill_accuracy",
        "MobileNetV1 on CIFAR-10, with and without a teacher",
        f"python -m benchmarks.distill_accuracy --seeds {' '.join(map(str, options.seeds))} "
        f"--arms {' '.join(options.arms)}",
        [
            shown,
            "Mean over the seeds (lowest … highest). Networks and stages are those of "
            f"`recipes/cifar10/mobilenet_v1.yaml`: {first.epochs:g} epochs on small images are "
            f"shared by the arms of a seed, then come {second.epochs:g} on whole images, the same "
            "images in the same order. Teacher: the ResNet-56 of `shared/checkpoints`. Losses of "
            f"both tools: KD at temperature {TEMPERATURE:g}, weight 1; squared difference of "
            f"`{LAYER}`, through a 1×1 convolution, to the teacher's `{TEACHER_LAYER}`, weight "
            f"{FEATURES:g}; labels at {LABELS:g}. torchdistill gives hooks and losses, the "
            "training loop is ours. Accuracy in PyTorch on the 10,000 test images, which are JPEG "
            "re-encodings.",
            where(records),
        ],
    )
    print(page.read_text())


if __name__ == "__main__":
    main()
