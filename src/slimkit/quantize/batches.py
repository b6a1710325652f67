"""Calibration data: batches of training data, checked, as calls of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from slimkit.errors import DataError, InputError
from slimkit.inputs import Inputs

__all__ = ["Batches"]


class Batches:
    """What the user passed as ``calibration``, to be read once or several times.

    Args:
        calibration: batches: tensors, (tensor, label) pairs, dictionaries or Inputs; or one
            batch.
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
        if isinstance(calibration, Tensor | Inputs | Mapping):
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

    def _raw(self) -> Iterator[Any]:
        for count, batch in enumerate(self._source, start=1):
            yield batch
            if count == self._limit:
                return


def _as_call(batch: Any, example: Inputs, number: int) -> Inputs:
    """A batch of a loader as a call: labels behind the inputs are left out."""
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Tensor):
        return Inputs((batch,))
    if isinstance(batch, Mapping):
        wanted = {name: batch[name] for name in example.kwargs if name in batch}
        return Inputs((), wanted or dict(batch))
    if isinstance(batch, tuple | list) and len(batch) >= max(1, len(example.args)):
        return Inputs(tuple(batch[: max(1, len(example.args))]))
    raise DataError(
        f"batch {number} is a {type(batch).__name__}, expected a tensor, a tuple whose first "
        "entries are the inputs, a dictionary or slimkit.Inputs",
        where="calibration",
    )


def _check_batch(inputs: Inputs, example: Inputs, number: int) -> None:
    tensors, expected = inputs.tensors(), example.tensors()
    if not tensors or any(tensor.numel() == 0 for tensor in tensors):
        raise DataError(f"batch {number} is empty", where="calibration")
    for tensor, like in zip(tensors, expected, strict=False):
        channels = like.is_floating_point() and like.dim() > 1  # token ids have lengths instead
        if tensor.dim() != like.dim() or (channels and tensor.shape[1] != like.shape[1]):
            raise DataError(
                f"batch {number} has shape {tuple(tensor.shape)}, the example inputs have "
                f"{tuple(like.shape)}",
                where="calibration",
                hint="batches are (N, C, H, W) like the example" if like.dim() == 4 else None,
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"batch {number} holds NaN or infinity", where="calibration")
