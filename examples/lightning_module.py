"""Prune, recover with distillation, quantize and export, with Lightning's Trainer.

python examples/lightning_module.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits as data
import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slimkit as sk


class Classifier(lightning.LightningModule):
    """A network and how it is trained; the distiller adds one term to the loss."""

    def __init__(
        self, network: nn.Module, lr: float, distiller: sk.distill.Distiller | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.lr = lr
        self.distiller = distiller

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        """Cross-entropy, plus what the teacher says."""
        images, labels = batch
        outputs = self.network(images)
        loss = F.cross_entropy(outputs, labels)
        if self.distiller is not None:
            loss = loss + self.distiller.loss(images, outputs)
            self.log_dict({f"distill/{name}": v for name, v in self.distiller.last.items()})
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with a cosine, over the network and the distiller's connectors."""
        connectors = self.distiller.parameters() if self.distiller else ()
        optimizer = torch.optim.SGD(
            [*self.network.parameters(), *connectors], lr=self.lr, momentum=0.9, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(
    network: nn.Module,
    loader: Any,
    steps: int,
    lr: float,
    distiller: sk.distill.Distiller | None = None,
) -> None:
    """Train ``network`` in place for ``steps`` steps."""
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network.train(), lr, distiller), loader)
    network.eval()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of the baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    digits = data.load()
    example = digits.train_images[:1]
    dataset = TensorDataset(digits.train_images, digits.train_labels)
    loader = DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True)

    baseline = data.small_network()
    train(baseline, loader, options.steps, lr=0.1)
    sk.export(baseline, options.out / "baseline.onnx", example)

    student = copy.deepcopy(baseline)
    sk.apply(student, sk.prune.plan(student, example, macs=0.5))
    losses = [sk.distill.KD(temperature=4.0), sk.distill.Mimic(student="11", weight=0.1)]
    with sk.distill.Distiller(student, baseline, losses, example_inputs=example) as distiller:
        train(student, loader, options.steps // 2, lr=0.05, distiller=distiller)

    quantized = sk.quantize.qat(student, example, calibration=list(digits.batches(4)))
    with sk.distill.Distiller(quantized, baseline, [sk.distill.KD()]) as distiller:
        train(quantized, loader, options.steps // 4, lr=0.0005, distiller=distiller)
    sk.export(quantized, options.out / "compressed.onnx", example)
    return data.compare(options.out / "baseline.onnx", options.out / "compressed.onnx", digits)


if __name__ == "__main__":
    main()
