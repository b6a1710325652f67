"""Calibration data: batches of training data, checked, as calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from slimkit.errors import DataError, InputError
from slimkit.inputs import Batch, Inputs, as_batch, tensors_of
from slimkit.outside import iterated

__all__ = ["Batches"]


class Batches:
    """What the user passed as ``calibration``, to be read once or several times.

    Args:
        calibration: batches, as :func:`~slimkit.inputs.as_batch` reads them; or one batch.
        example: a call, whose shapes the batches must have.
        limit: read so many batches; all by default.
        keep: hold the batches of an iterator that can be read only once.

    Attributes:
        first: the first batch, once it was read.

    Raises:
        DataError: not iterable, or test data. While reading: empty, fewer than ``limit``, or a
            bad batch.
        InputError: ``limit`` is below 1.
    """

    def __init__(
        self,
        calibration: Iterable[Any],
        example: Inputs,
        limit: int | None = None,
        *,
        keep: bool = False,
    ) -> None:
        for holder in (calibration, getattr(calibration, "dataset", None)):
            if getattr(holder, "role", None) == "test":
                raise DataError(
                    "test data must not be used for calibration",
                    where="calibration",
                    hint="use training data",
                )
        if limit is not None and limit < 1:
            raise InputError(f"{limit} is not a number of batches ≥ 1", where="batches")
        if isinstance(calibration, Tensor | Inputs | Batch | Mapping):
            calibration = [calibration]
        if not isinstance(calibration, Iterable):
            raise DataError(
                f"expected batches, got {type(calibration).__name__}", where="calibration"
            )
        self._example, self._limit = example, limit
        self.first: Inputs | None = None
        self._source: Iterable[Any] = calibration
        self._keep = keep and isinstance(calibration, Iterator)

    def __iter__(self) -> Iterator[Inputs]:
        """Checked batches, in order."""
        if self._keep:
            self._source, self._keep = list(self._raw()), False
        count = 0
        for batch in self._raw():
            count += 1
            inputs = _as_call(batch, self._example, count)
            _check_batch(inputs, self._example, count)
            if self.first is None:
                self.first = inputs
            yield inputs
        if count == 0:
            raise DataError("there is no batch in it", where="calibration")
        if self._limit is not None and count < self._limit:
            raise DataError(
                f"it has {count} batches, {self._limit} were asked for", where="calibration"
            )

    def __length_hint__(self) -> int:
        """How many batches there are, 0 where nobody knows."""
        count = len(self._source) if isinstance(self._source, Sized) else 0
        return count if self._limit is None else min(self._limit, count or self._limit)

    def _raw(self) -> Iterator[Any]:
        for count, batch in enumerate(iterated(self._source, where="calibration"), start=1):
            yield batch
            if count == self._limit:
                return


def _as_call(item: Any, example: Inputs, number: int) -> Inputs:
    """A batch of a loader as a call: targets are left out."""
    try:
        inputs = as_batch(item, example).inputs
    except InputError as error:
        raise DataError(f"batch {number}: {error.message}", where="calibration") from error
    args = tuple(
        list(given) if isinstance(like, list) and isinstance(given, tuple) else given
        for given, like in zip_longest(inputs.args, example.args[: len(inputs.args)])
    )  # collating by ``tuple(zip(*samples))`` makes tuples of lists
    return Inputs(args, inputs.kwargs)


def _check_batch(inputs: Inputs, example: Inputs, number: int) -> None:
    tensors = inputs.tensors()
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        raise DataError(f"batch {number} is empty", where="calibration")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"batch {number} holds NaN or infinity", where="calibration")
    pairs = list(zip(inputs.args, example.args, strict=False))
    pairs += [(value, example.kwargs.get(name)) for name, value in inputs.kwargs.items()]
    tokens = any(not t.is_floating_point() and t.dim() == 2 for t in example.tensors())
    for given, like in pairs:
        _check_argument(given, like, number, shortest=3 if tokens else 2)


def _check_argument(given: Any, like: Any, number: int, *, shortest: int) -> None:
    """One argument against that of the example.

    Args:
        given: in the batch.
        like: in the example.
        number: of the batch.
        shortest: tensors of fewer dimensions have no channels: beside token ids (N, T) masks have
            lengths instead.
    """
    if isinstance(like, list) != isinstance(given, list) and _holds_tensors(like):
        kinds = [f"a {type(x).__name__}" for x in (given, like)]
        raise DataError(
            f"batch {number} has {kinds[0]} where the example inputs have {kinds[1]}",
            where="calibration",
            hint="a model that takes a list of images gets batches such as ([image, …], targets)",
        )
    if isinstance(like, list) and isinstance(given, list):
        first = next(tensors_of(like), None)
        for entry in given:
            if isinstance(entry, Tensor) and isinstance(first, Tensor):
                _check_tensor(entry, first, number, axis=0, shortest=2)  # (C, H, W) of any size
        return
    for tensor, known in zip(tensors_of(given), tensors_of(like), strict=False):
        _check_tensor(tensor, known, number, axis=1, shortest=shortest)


def _holds_tensors(value: Any) -> bool:
    return next(tensors_of(value), None) is not None


def _check_tensor(tensor: Tensor, like: Tensor, number: int, *, axis: int, shortest: int) -> None:
    """Dimensions, and channels along ``axis`` of numbers that are no token ids."""
    channels = like.is_floating_point() and like.dim() >= shortest
    if tensor.dim() != like.dim() or (channels and tensor.shape[axis] != like.shape[axis]):
        raise DataError(
            f"batch {number} has shape {tuple(tensor.shape)}, the example inputs have "
            f"{tuple(like.shape)}",
            where="calibration",
            hint="batches are (N, C, H, W) like the example" if like.dim() == 4 else None,
        )
