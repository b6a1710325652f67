"""Batches of normalised images: the one loader that training, calibration and tests use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from slimkit.errors import DataError
from slimkit.tasks.data.augmentation import Draws, augment, draw
from slimkit.tasks.data.settings import AugmentSettings
from slimkit.tasks.data.stores import ImageStore, MemoryStore

__all__ = ["ArrayLoader", "Role"]

Role = Literal["train", "validation", "test"]


class ArrayLoader:
    """Iterate over ``(images, labels)``: float32 (B, C, H, W), channels-last, and int64 (B,).

    The order and every random change depend on (seed, epoch) only, so that an epoch can be
    repeated exactly after an interruption.

    Args:
        images: uint8 (N, H, W, C), or a store of images.
        labels: int64 (N,).
        batch_size: images per batch.
        role: which split this is; what must not look at the test split asks for it.
        mean, std: per channel, of images in [0, 1].
        indices: which images, in which order; all by default.
        shuffle: draw a new order each epoch.
        augment: random changes.
        drop_last: leave out a last batch that is not full (unless it is the only one).
        seed: of order and changes.

    Attributes:
        role: ``"train"``, ``"validation"`` or ``"test"``.
        epoch: set by :meth:`set_epoch`.
        labels: of the images in use, in the order of ``indices``.
    """

    def __init__(
        self,
        images: Tensor | ImageStore,
        labels: Tensor,
        *,
        batch_size: int,
        role: Role,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        indices: Tensor | None = None,
        shuffle: bool = False,
        augment: AugmentSettings | None = None,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.store: ImageStore = MemoryStore(images) if isinstance(images, Tensor) else images
        if len(self.store) != len(labels):
            raise DataError(f"{len(self.store)} images but {len(labels)} labels", where="labels")
        self.indices = torch.arange(len(labels)) if indices is None else indices
        if not len(self.indices):
            raise DataError(f"the {role} split is empty", where=role)
        self.labels = labels.to(torch.int64)[self.indices]
        self.batch_size = batch_size
        self.role: Role = role
        self.shuffle = shuffle
        self.augment = augment
        self.drop_last = drop_last and len(self.indices) >= batch_size
        self.seed = seed
        self.epoch = 0
        self._rank, self._world = 0, 1
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self._scale = scale.float().view(1, -1, 1, 1)
        self._shift = shift.float().view(1, -1, 1, 1)

    @property
    def samples(self) -> int:
        """Images in the split."""
        return len(self.indices)

    def __len__(self) -> int:
        """Batches per epoch (of this process)."""
        samples = self.samples // self._world
        if self.drop_last:
            return max(1, samples // self.batch_size)
        return math.ceil(samples / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the random changes of the next iteration."""
        self.epoch = epoch

    def set_seed(self, seed: int) -> None:
        """Choose another stream of orders and changes (another run of the same experiment)."""
        self.seed = seed

    def shard(self, rank: int, world_size: int) -> None:
        """Iterate over one of ``world_size`` equal parts of every epoch."""
        self._rank, self._world = rank, world_size

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """At most the first ``count`` batches."""
        return itertools.islice(iter(self), count)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, labels) for images, labels, _ in self.with_ids())

    def with_ids(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same batches with the numbers of their samples, int64 (B,): places in ``labels``."""
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        count = self.samples
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        draws = draw(self.augment, count, generator) if self.augment else None
        if self._world > 1:
            order = order[self._rank : count - count % self._world : self._world]
        chunks = list(torch.split(order, self.batch_size))[: len(self)]
        if isinstance(self.store, MemoryStore):
            for chunk in chunks:
                yield self._batch(chunk, draws)
            return
        with ThreadPoolExecutor(1, "slimkit-prefetch") as ahead:  # decode while the model works
            pending = ahead.submit(self._batch, chunks[0], draws)
            for chunk in chunks[1:]:
                ready, pending = pending.result(), ahead.submit(self._batch, chunk, draws)
                yield ready
            yield pending.result()

    def _batch(self, chunk: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
        images, read = self.store.fetch(self.indices[chunk])
        if len(read) != len(chunk):
            chunk = chunk[read]
        if draws is not None and self.augment is not None:
            images = augment(images, self.augment, draws.at(chunk))
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        return pixels.mul_(self._scale).add_(self._shift), self.labels[chunk], chunk


def _mix(seed: int, epoch: int) -> int:
    """Two numbers → one seed; neighbours must not share a stream."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)
