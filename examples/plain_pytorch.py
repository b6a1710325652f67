"""Prune, recover with distillation, quantize and export, inside a PyTorch loop of one's own.

python examples/plain_pytorch.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import digits as data
import torch
import torch.nn.functional as F
from torch import nn

import slimkit as sk


def train(
    model: nn.Module,
    digits: data.Digits,
    steps: int,
    lr: float,
    distiller: sk.distill.Distiller | None = None,
) -> None:
    """An ordinary training loop; the distiller adds one term to its loss."""
    parameters = [*model.parameters(), *(distiller.parameters() if distiller else ())]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for images, labels in digits.batches(steps):
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels)
        if distiller is not None:
            loss = loss + distiller.loss(images, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of the baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/plain_pytorch"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = data.load()
    example = digits.train_images[:1]

    baseline = data.small_network()
    train(baseline, digits, options.steps, lr=0.1)
    sk.export(baseline, options.out / "baseline.onnx", example)

    # Half of the multiply-adds go. The plan is a value: print it, save it, apply it.
    student = copy.deepcopy(baseline)
    plan = sk.prune.plan(student, example, macs=0.5)
    print(plan.explain())
    sk.apply(student, plan)

    # The unpruned network teaches the pruned one.
    losses = [sk.distill.KD(temperature=4.0), sk.distill.Mimic(student="11", weight=0.1)]
    with sk.distill.Distiller(student, baseline, losses, example_inputs=example) as distiller:
        train(student, digits, options.steps // 2, lr=0.05, distiller=distiller)

    # A quantized network is a module like any other: train it with the same loop.
    calibration = list(digits.batches(4))
    quantized = sk.quantize.qat(student, example, calibration=calibration)
    with sk.distill.Distiller(quantized, baseline, [sk.distill.KD()]) as distiller:
        train(quantized, digits, options.steps // 4, lr=0.0005, distiller=distiller)
    sk.export(quantized, options.out / "compressed.onnx", example)

    sk.save(quantized, options.out / "model")
    return data.compare(options.out / "baseline.onnx", options.out / "compressed.onnx", digits)


if __name__ == "__main__":
    main()
