"""What the examples share: scikit-learn's handwritten digits, a small network, a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import slimkit as sk
from slimkit.runtime import open_session


class Digits(NamedTuple):
    """1257 training and 540 test images, (N, 1, 16, 16) about zero, and their labels 0 … 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def batches(self, steps: int, size: int = 64, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """``steps`` random training batches."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            chosen = torch.randint(len(self.train_labels), (size,), generator=generator)
            yield self.train_images[chosen], self.train_labels[chosen]


def load() -> Digits:
    """The digits that come with scikit-learn, enlarged to 16×16 pixels."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear")
    labels = torch.tensor(raw.target)
    train, test = train_test_split(
        range(len(labels)), test_size=540, stratify=raw.target, random_state=0
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def small_network() -> nn.Module:
    """A plain convolutional network: nothing of Slimkit in it."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    features = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 128, 2), *block(128, 128, 1)]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def compare(before: Path, after: Path, digits: Digits) -> list[dict[str, float]]:
    """Accuracy (%), size (kB) and latency (ms) of two ONNX files, measured in ONNX Runtime."""
    rows = []
    for path in (before, after):
        (logits,) = open_session(path).run([digits.test_images.numpy()])
        correct = torch.from_numpy(logits).argmax(1) == digits.test_labels
        timing = sk.benchmark(path, threads=1, batch=1, seconds=0.3)
        rows.append(
            {
                "accuracy": 100 * correct.float().mean().item(),
                "kilobytes": path.stat().st_size / 1000,
                "milliseconds": timing.median_ms,
            }
        )
        print(
            f"{path.name:16}" + "".join(f"{value:10.3f} {unit}" for unit, value in rows[-1].items())
        )
    return rows
