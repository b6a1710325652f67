"""A problem that is learnt in a second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slimkit.tasks.data import ArrayLoader, AugmentSettings

CLASSES = 4


def small_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Flatten(),
        nn.Linear(8 * 16, CLASSES),
    )


def bright_quarters(count: int = 96) -> tuple[Tensor, Tensor]:
    """Noise with one brighter quarter, which is the class: uint8 (N, 8, 8, 1)."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 128, (count, 8, 8, 1), generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[index, row : row + 4, column : column + 4] += 100
    return images.to(torch.uint8), labels


def loader(batch_size: int = 16, **kwargs: object) -> ArrayLoader:
    images, labels = bright_quarters()
    return ArrayLoader(
        images,
        labels,
        batch_size=batch_size,
        role="train",
        mean=(0.4,),
        std=(0.2,),
        shuffle=True,
        augment=AugmentSettings(crop=1),
        **kwargs,  # type: ignore[arg-type]
    )


@pytest.fixture
def make_network() -> Callable[[], nn.Sequential]:
    return small_network


@pytest.fixture
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture
def data() -> ArrayLoader:
    return loader()
