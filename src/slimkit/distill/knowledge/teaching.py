"""Teachers: a protocol that answers about samples by their numbers, and a network that does."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from slimkit.artifact import tensors_hash
from slimkit.distill.knowledge.format.encoding import encode
from slimkit.distill.knowledge.format.schema import LOGITS, KeySpec, KnowledgeSchema
from slimkit.distill.teacher import FrozenTeacher, TeacherPrecision
from slimkit.errors import DataError, InputError
from slimkit.inputs import ExampleInputs, Inputs, as_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["INPUT", "NetworkTeacher", "Samples", "Teacher"]

INPUT = "input"
"""The name of the one input of a network that is called with one tensor."""


class Samples(Protocol):
    """Inputs by number; :func:`slimkit.tasks.data.samples.training_samples` makes one."""

    @property
    def ids(self) -> Tensor:
        """Numbers of all samples, ascending, int64 (N,)."""

    @property
    def fingerprint(self) -> str:
        """Equal where a number means the same input, changed in the same way."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the logits; empty where there are none."""

    @property
    def seed(self) -> int:
        """Of the random changes."""

    def inputs(self, ids: Tensor, number: int) -> Tensor:
        """Inputs (B, …) of some samples as pass ``number`` changes them."""


class Teacher(Protocol):
    """Answers about samples; called from several threads at once.

    Attributes:
        schema: what it knows.
        batch_size: samples that it likes to be asked for at once.
        parallel: questions that it works on at the same time.
    """

    schema: KnowledgeSchema
    batch_size: int
    parallel: int

    def answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> pa.RecordBatch:
        """Knowledge about samples.

        Args:
            ids: (B,) numbers of samples, or of queries.
            number: of the pass.
            names: keys that are wanted.
            inputs: what the student sent along, (B, …) each; None if nothing.

        Returns:
            A record batch in the order of ``ids``.

        Raises:
            SlimkitError: the question is wrong; the student is told.
        """


class NetworkTeacher:
    """A network that answers about samples, on one device or several.

    Args:
        model: any module; it is copied and frozen.
        samples: where inputs come from; None for a teacher that is sent its inputs.
        keys: ``"logits"`` for the output, paths of layers for features.
        dtype: in which knowledge is stored and sent.
        top_k: keep only the so many largest logits of a sample, see :class:`KeySpec`.
        batch_size: samples per forward.
        devices: one copy runs on each, at the same time.
        precision: how the network runs; see :class:`slimkit.distill.Distiller`. What
            ``"auto"`` comes to is decided on the first samples, so that a restarted teacher
            answers like the one before.
        example_inputs: a batch, needed without ``samples``.
        name: of the teacher, for people.

    Raises:
        UnknownNameError: a layer does not exist.
        InputError: no samples and no example inputs, or no key.
        ModelError: the network cannot run on the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples | None = None,
        keys: Sequence[str] = (LOGITS,),
        *,
        dtype: str = "float16",
        top_k: int | None = None,
        batch_size: int = 128,
        devices: Sequence[str | torch.device] = ("cpu",),
        precision: TeacherPrecision = "auto",
        example_inputs: ExampleInputs | None = None,
        name: str | None = None,
    ) -> None:
        if not keys or not devices or batch_size < 1:
            raise InputError("a teacher needs a key, a device and a batch size", where="teacher")
        self.samples = samples
        self.batch_size = batch_size
        self.parallel = len(devices)
        self._layers = {key: "" if key == LOGITS else key for key in keys}
        probe = self._probe(example_inputs)
        self._idle: queue.SimpleQueue[tuple[FrozenTeacher, torch.device]] = queue.SimpleQueue()
        for device in map(torch.device, devices):
            teacher = FrozenTeacher(model, self._layers.values(), precision)
            records = teacher(probe.to(device))
            precision = cast("TeacherPrecision", teacher.precision)  # decided by now
            self._idle.put((teacher, device))
        self._workers = ThreadPoolExecutor(len(devices), "slimkit-teacher")
        specs = [
            _spec(key, records[layer], dtype, top_k if key == LOGITS else None)
            for key, layer in self._layers.items()
        ]
        label = name or type(model).__name__
        self.schema = KnowledgeSchema(
            keys=tuple(specs),
            fingerprint=samples.fingerprint if samples else "",
            samples=len(samples.ids) if samples else 0,
            classes=samples.classes if samples else (),
            seed=samples.seed if samples else 0,
            teacher=f"{label} {tensors_hash(model.state_dict())[:16]} {precision}",
            inputs=() if samples else _inputs_of(example_inputs),
        )
        self._check_classes()

    @property
    def ids(self) -> NDArray[np.int64]:
        """Numbers of all samples.

        Raises:
            InputError: the teacher has none of its own.
        """
        if self.samples is None:
            raise InputError("a teacher without samples is sent its inputs", where="samples")
        found: NDArray[np.int64] = self.samples.ids.numpy()
        return found

    def answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, NDArray[np.generic]] | None = None,
    ) -> pa.RecordBatch:
        """See :class:`Teacher`."""
        # always in the same threads: torch keeps helpers of its own for every thread that calls it
        return self._workers.submit(self._answer, ids, number, names, inputs).result()

    def _answer(
        self,
        ids: NDArray[np.int64],
        number: int,
        names: Sequence[str],
        inputs: Mapping[str, NDArray[np.generic]] | None,
    ) -> pa.RecordBatch:
        given = self._inputs(ids, number, inputs)
        teacher, device = self._idle.get()
        try:
            records = teacher(as_inputs(given).to(device))
        finally:
            self._idle.put((teacher, device))
        wanted = {name: records[self._layers[name]] for name in names}
        return encode(self.schema, ids, wanted, where=self.schema.teacher)

    def _inputs(
        self, ids: NDArray[np.int64], number: int, inputs: Mapping[str, NDArray[np.generic]] | None
    ) -> Any:
        if self.samples is not None:
            if inputs is not None:
                raise DataError("the teacher has its own inputs, none are sent", where="inputs")
            return self.samples.inputs(torch.from_numpy(ids.copy()), number)
        if not inputs:
            raise DataError("the teacher has no samples: send the inputs along", where="inputs")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        return tensors.get(INPUT, tensors)

    def _probe(self, example_inputs: ExampleInputs | None) -> Any:
        if example_inputs is not None:
            return as_inputs(example_inputs)
        if self.samples is None:
            raise InputError("pass a batch, or samples", where="example_inputs")
        return as_inputs(self.samples.inputs(self.samples.ids[: self.batch_size], 0))

    def _check_classes(self) -> None:
        for key in self.schema.keys:
            classes = len(self.schema.classes)
            if key.name == LOGITS and classes and key.shape != (classes,):
                raise DataError(
                    f"its output has shape {key.shape} and the data {classes} classes",
                    where="teacher",
                    hint="a teacher for these classes, in this order",
                )


def _spec(key: str, record: Tensor, dtype: str, top_k: int | None = None) -> KeySpec:
    """What a key looks like, from a batch of it.

    Raises:
        InputError: no such type, or it cannot keep so many largest values.
    """
    shape = tuple(record.shape[1:])
    try:
        return KeySpec.model_validate({"name": key, "shape": shape, "dtype": dtype, "top_k": top_k})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or key
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{message}, got {first['input']!r}", where=where) from error


def _inputs_of(example: ExampleInputs | None) -> tuple[KeySpec, ...]:
    """What must be sent along, from an example of it."""
    given = as_inputs(example) if example is not None else Inputs()
    named = dict(given.kwargs) if given.kwargs else {INPUT: given.args[0]}
    specs = []
    for name, tensor in named.items():
        dtype = "float32" if tensor.is_floating_point() else "int64"
        specs.append(_spec(name, tensor, dtype))
    return tuple(specs)
