"""The training samples by number: what a teacher and a student elsewhere agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkit.tasks.data.loaders import ArrayLoader
from slimkit.tasks.data.loading import ImageSplits

__all__ = ["TrainingSamples", "training_samples"]


@dataclass(frozen=True)
class TrainingSamples:
    """Random access to the training images, in passes with fixed random changes.

    Attributes:
        loader: of the training split.
        fingerprint: equal where a number means the same image, changed in the same way.
        classes: names in the order of the labels.
        seed: of the random changes.
    """

    loader: ArrayLoader
    fingerprint: str
    classes: tuple[str, ...]
    seed: int

    @property
    def ids(self) -> Tensor:
        """Numbers of all samples, ascending, int64 (N,)."""
        return self.loader.indices.sort().values

    def inputs(self, ids: Tensor, number: int) -> Tensor:
        """Images of some samples as pass ``number`` changes them, float32 (B, C, H, W).

        Raises:
            DataError: a number is not of this split.
        """
        return self.loader.inputs(ids.to(torch.int64), number, self.seed)


def training_samples(splits: ImageSplits, *, seed: int = 0) -> TrainingSamples:
    """The training split as samples with numbers.

    Args:
        splits: the data.
        seed: of the random changes.
    """
    return TrainingSamples(splits.train, splits.samples_fingerprint, tuple(splits.classes), seed)
