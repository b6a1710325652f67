"""Prune, recover with distillation, quantize and export a Hugging Face model, with its Trainer.

python examples/huggingface_trainer.py --steps 100
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits as data
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import slimkit as sk


class DistillingTrainer(Trainer):
    """The Trainer with a teacher: the loss gets one more term."""

    def __init__(self, *args: Any, distiller: sk.distill.Distiller | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distiller = distiller

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Cross-entropy, plus what the teacher says."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels)
        if self.distiller is not None:
            loss = loss + self.distiller.loss(inputs, outputs)
        return (loss, outputs) if return_outputs else loss


def train(
    model: nn.Module,
    dataset: list[dict[str, Tensor]],
    steps: int,
    lr: float,
    out: Path,
    distiller: sk.distill.Distiller | None = None,
) -> None:
    """Train ``model`` in place for ``steps`` steps."""
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=0,
    )
    DistillingTrainer(model, settings, train_dataset=dataset, distiller=distiller).train()
    model.eval()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of the baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    digits = data.load()
    dataset = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(digits.train_images, digits.train_labels, strict=True)
    ]
    example = {"pixel_values": digits.train_images[:1]}
    calibration = [{"pixel_values": images} for images, _ in digits.batches(4)]

    config = ResNetConfig(
        num_channels=1,
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=10,
        downsample_in_first_stage=False,
    )
    baseline = ResNetForImageClassification(config)
    train(baseline, dataset, options.steps, 2e-3, options.out)
    sk.export(baseline, options.out / "baseline.onnx", example)

    student = copy.deepcopy(baseline)
    sk.apply(student, sk.prune.plan(student, example, macs=0.5))
    with sk.distill.Distiller(student, baseline, [sk.distill.KD(temperature=4.0)]) as distiller:
        train(student, dataset, options.steps // 2, 1e-3, options.out, distiller)

    quantized = sk.quantize.qat(student, example, calibration=calibration)
    with sk.distill.Distiller(quantized, baseline, [sk.distill.KD()]) as distiller:
        train(quantized, dataset, options.steps // 4, 1e-4, options.out, distiller)
    sk.export(quantized, options.out / "compressed.onnx", example)
    return data.compare(options.out / "baseline.onnx", options.out / "compressed.onnx", digits)


if __name__ == "__main__":
    main()
