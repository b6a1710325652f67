"""What the tests of distillation in the training loop share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Batches:
    """Four batches; the same in every epoch."""

    role = "train"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 8, 3, 6, 6, generator=generator)
        labels = torch.randint(4, (4, 8), generator=generator)
        self.batches = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def with_ids(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number, (images, labels) in enumerate(self.batches):
            yield images, labels, torch.arange(8) + 8 * number


def network(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 4),
    )
