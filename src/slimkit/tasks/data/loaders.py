"""Batches of normalised images: the one loader that training, calibration and tests use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.errors import DataError
from slimkit.tasks.data.augmentation import Draws, augment, draw
from slimkit.tasks.data.settings import AugmentSettings
from slimkit.tasks.data.stores import ImageStore, MemoryStore
from slimkit.tasks.splits import Role

__all__ = ["ArrayLoader"]


@door
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
        ids: numbers of the samples (from ``indices``) in the batch that was yielded last, int64
            (B,); they stay the same whatever the order and the batch size.
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
        self.ids = self.indices[:0]
        self._changes: tuple[int, int | None] | None = None
        self._drawn: tuple[tuple[int, int], Draws | None] | None = None
        self._sorted: tuple[Tensor, Tensor] | None = None
        self._rank, self._world = 0, 1
        scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self._scale = scale.float().view(1, -1, 1, 1)
        self._shift = shift.float().view(1, -1, 1, 1)

    @property
    def samples(self) -> int:
        """Images in the split."""
        return len(self.indices)

    @property
    def augmented(self) -> bool:
        """Whether images are changed at random."""
        return self.augment not in {None, AugmentSettings()}

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

    def fix_changes(self, seed: int | None, passes: int | None = None) -> None:
        """Draw the random changes from ``seed`` and the number of the pass alone.

        Epoch ``e`` then changes images as pass ``e`` (modulo ``passes``) does, here and in any
        other process with the same settings, whatever the order; see :meth:`inputs`. ``None``
        goes back to changes that every epoch and every run draws for itself.
        """
        self._changes = None if seed is None else (seed, passes)

    def pass_of(self, epoch: int) -> int:
        """The number of the pass whose random changes an epoch has."""
        passes = self._changes[1] if self._changes is not None else None
        return epoch if passes is None else epoch % passes

    def inputs(self, ids: Tensor, number: int, seed: int) -> Tensor:
        """The images of some samples, as :meth:`fix_changes` makes a pass change them.

        Args:
            ids: int64 (B,), numbers of samples of this split.
            number: of the pass.
            seed: of the random changes.

        Returns:
            float32 (B, C, H, W), as a batch would have them; black where an image cannot be
            read and is skipped.

        Raises:
            DataError: a number is not of this split.
        """
        ascending, positions = self._positions()
        places = torch.searchsorted(ascending, ids).clamp_max(len(ascending) - 1)
        strange = ids[ascending[places] != ids]
        if len(strange):
            raise DataError(
                f"there is no sample {int(strange[0])}",
                where=self.role,
                hint=f"the numbers are among {int(ascending[0])} … {int(ascending[-1])}",
            )
        chunk = positions[places]
        pixels, read = self._pixels(chunk, self._draws(seed, number))
        if len(read) == len(chunk):
            return pixels
        black = torch.zeros(len(chunk), *pixels.shape[1:])
        black[read] = pixels
        return black

    def epoch_ids(self, epoch: int) -> list[Tensor]:
        """The numbers of the samples in every batch of an epoch, in its order."""
        chunks, _ = self._chunks(epoch)
        return [self.indices[chunk] for chunk in chunks]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images, labels) for images, labels, _ in self.with_ids())

    def with_ids(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same batches with the numbers of their samples, int64 (B,): places in ``labels``."""
        chunks, generator = self._chunks(self.epoch)
        draws = None
        if self._changes is not None:
            draws = self._draws(self._changes[0], self.pass_of(self.epoch))
        elif self.augment:
            draws = draw(self.augment, self.samples, generator)
        if isinstance(self.store, MemoryStore):
            for chunk in chunks:
                yield self._handed(self._batch(chunk, draws))
            return
        with ThreadPoolExecutor(1, "slimkit-prefetch") as ahead:  # decode while the model works
            pending = ahead.submit(self._batch, chunks[0], draws)
            for chunk in chunks[1:]:
                ready, pending = pending.result(), ahead.submit(self._batch, chunk, draws)
                yield self._handed(ready)
            yield self._handed(pending.result())

    def _chunks(self, epoch: int) -> tuple[list[Tensor], torch.Generator]:
        """Positions in ``indices`` of every batch, and the generator that drew their order."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        count = self.samples
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if self._world > 1:
            order = order[self._rank : count - count % self._world : self._world]
        return list(torch.split(order, self.batch_size))[: len(self)], generator

    def _draws(self, seed: int, number: int) -> Draws | None:
        """The random changes of a pass; the last ones are kept."""
        if not self.augment:
            return None
        key, held = (seed, number), self._drawn
        if held is None or held[0] != key:
            generator = torch.Generator().manual_seed(_mix(seed, number))
            held = self._drawn = (key, draw(self.augment, self.samples, generator))
        return held[1]  # not read again: other threads may be at another pass

    def _positions(self) -> tuple[Tensor, Tensor]:
        if self._sorted is None:
            ascending, positions = self.indices.sort()
            self._sorted = (ascending, positions)
        return self._sorted

    def _handed(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        self.ids = self.indices[batch[2]]
        return batch

    def _batch(self, chunk: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
        pixels, read = self._pixels(chunk, draws)
        if len(read) != len(chunk):
            chunk = chunk[read]
        return pixels, self.labels[chunk], chunk

    def _pixels(self, chunk: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """Normalised images, and which of the chunk could be read."""
        images, read = self.store.fetch(self.indices[chunk])
        if len(read) != len(chunk):
            chunk = chunk[read]
        if draws is not None and self.augment is not None:
            images = augment(images, self.augment, draws.at(chunk))
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        return pixels.mul_(self._scale).add_(self._shift), read


def _mix(seed: int, epoch: int) -> int:
    """Two numbers → one seed; neighbours must not share a stream."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)
