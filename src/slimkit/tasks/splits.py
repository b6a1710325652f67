"""The data of a task: four loaders and what a report, a model and a file must know of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from slimkit.doors import door
from slimkit.errors import DataError, InputError
from slimkit.inputs import Batch, as_batch

__all__ = ["Loader", "Role", "SampleLoader", "Samples", "Splits", "first_batches", "some_examples"]

Role = Literal["train", "validation", "test"]


class Loader(Protocol):
    """What stages and proofs iterate over: anything that :func:`slimkit.inputs.as_batch` reads.

    Attributes:
        role: ``"train"``, ``"validation"`` or ``"test"``; what must not look at a split asks it.
        batch_size: samples per batch.
        augmented: samples are changed at random, so that no epoch shows one as it was.
    """

    role: Role
    batch_size: int

    @property
    def augmented(self) -> bool: ...  # noqa: D102 - said above

    @property
    def samples(self) -> int:
        """Samples per epoch."""
        ...

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the random changes of the next iteration."""

    def set_seed(self, seed: int) -> None:
        """Choose another stream of orders and changes."""


@dataclass(frozen=True)
class Splits:
    """A data set ready for use.

    Attributes:
        train: shuffled and augmented, role ``"train"``.
        calibration: the same samples in one fixed random order, not augmented, role ``"train"``.
        validation: to select by, role ``"validation"``; None when there is none.
        test: to report, role ``"test"``.
        fingerprint: equal where content and the settings that shape it are; part of cache keys.
        classes: names in the order of the labels; empty where there are none.
        preprocessing: what turns a sample into an input, JSON-able; written into exported files.
        facts: what else a report should say of the data, JSON-able.
        named: the source's own splits by their names, not augmented, where they are others: a
            source without a test split reports on what it calls ``val``.
    """

    train: Loader
    calibration: Loader
    validation: Loader | None
    test: Loader
    fingerprint: str
    classes: Sequence[str] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    named: Mapping[str, Loader] = field(default_factory=dict, kw_only=True)


def first_batches(loader: Iterable[Any], count: int | None = None) -> Iterator[Batch]:
    """At most the first ``count`` batches; all by default."""
    return (as_batch(item) for item in itertools.islice(iter(loader), count))


def some_examples(loader: Iterable[Any], count: int) -> Batch:
    """The first ``count`` samples of a loader, or its whole first batch if that has fewer.

    Raises:
        DataError: it yields nothing.
    """
    for batch in first_batches(loader, 1):
        return batch.split(count)[0]
    raise DataError("it yields no batch", where=getattr(loader, "role", "loader"))


class Samples(Protocol):
    """What can be asked for a sample by its number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@door
class SampleLoader:
    """Batches of any samples: an indexable data set, and a function that collates them.

    The order depends on (seed, epoch) only, so that an interrupted epoch can be repeated.
    Samples are fetched one by one, in this process or in ``workers`` of torch's DataLoader.

    Args:
        samples: ``samples[n]`` is whatever ``collate`` takes.
        collate: a list of samples → a batch, as :func:`slimkit.inputs.as_batch` reads it.
        batch_size: samples per batch.
        role: which split this is.
        change: ``change(sample, generator)`` → the sample, changed at random; None does not.
        indices: which samples, in which order; all by default.
        shuffle: draw a new order each epoch.
        seed: of orders and changes.
        workers: processes that fetch ahead.

    Raises:
        DataError: there is no sample.
    """

    def __init__(
        self,
        samples: Samples,
        collate: Callable[[list[Any]], Any],
        *,
        batch_size: int,
        role: Role,
        change: Callable[[Any, torch.Generator], Any] | None = None,
        indices: Sequence[int] | Tensor | None = None,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        self.role: Role = role
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        if not hasattr(samples, "__len__") or not hasattr(samples, "__getitem__"):
            raise InputError(
                f"expected a data set with length and index, got {type(samples).__name__}",
                where="samples",
            )
        self.indices = torch.arange(len(samples)) if indices is None else torch.as_tensor(indices)
        if not len(self.indices):
            raise DataError(f"the {role} split is empty", where=role)
        self._samples, self._collate, self._change = samples, collate, change
        self._shuffle, self._workers = shuffle, workers
        self._rank, self._world = 0, 1

    @property
    def augmented(self) -> bool:
        """Whether samples are changed at random."""
        return self._change is not None

    @property
    def samples(self) -> int:
        """Samples in the split."""
        return len(self.indices)

    def __len__(self) -> int:
        """Batches per epoch (of this process)."""
        return math.ceil(self.samples // self._world / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the random changes of the next iteration."""
        self.epoch = epoch

    def set_seed(self, seed: int) -> None:
        """Choose another stream of orders and changes."""
        self.seed = seed

    def shard(self, rank: int, world_size: int) -> None:
        """Iterate over one of ``world_size`` equal parts of every epoch."""
        self._rank, self._world = rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self._numbered())

    def with_ids(self) -> Iterator[Batch]:
        """The same batches with the numbers of their samples, int64 (B,)."""
        for item, ids in self._numbered():
            batch = as_batch(item)
            yield Batch(batch.inputs, batch.targets, ids)

    def names_of(self, ids: Tensor) -> list[str]:
        """What the samples of these numbers are called: the files of images, else the numbers."""
        name_of = getattr(self._samples, "name_of", str)
        return [name_of(number) for number in ids.tolist()]

    def _numbered(self) -> Iterator[tuple[Any, Tensor]]:
        from torch.utils.data import DataLoader

        base = self.seed * 1_000_003 + self.epoch * 7_919 + 12_345
        generator = torch.Generator().manual_seed(base % 2**63)
        count = self.samples
        order = torch.randperm(count, generator=generator) if self._shuffle else torch.arange(count)
        if self._world > 1:
            order = order[self._rank : count - count % self._world : self._world]
        chunks = list(torch.split(self.indices[order], self.batch_size))
        loader: Any = DataLoader(
            _Changed(self._samples, self._change, base),  # type: ignore[arg-type]
            batch_sampler=[chunk.tolist() for chunk in chunks],
            collate_fn=self._collate,
            num_workers=self._workers,
            generator=generator,
        )
        return zip(loader, chunks, strict=True)


@dataclass(frozen=True)
class _Changed:
    """Samples by number, each changed by a generator of its own, whichever process asks."""

    samples: Samples
    change: Callable[[Any, torch.Generator], Any] | None
    base: int

    def __getitem__(self, number: int) -> Any:
        sample = self.samples[number]
        if self.change is None:
            return sample
        seed = (self.base * 2_147_483_647 + number) % 2**63
        return self.change(sample, torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.samples)
