"""Proof that the exported file computes what the PyTorch network computes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from slimkit.artifact import PathLike
from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.inputs import Inputs
from slimkit.modules import evaluation
from slimkit.outside import iterated
from slimkit.runtime.sessions import Session, open_session
from slimkit.runtime.structure import batch_inputs, in_signature_order, named_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["LIMITS", "OutputParity", "Parity", "parity"]

LIMITS = {
    "fp32": {"max_abs_diff": 1e-4},
    "int8": {"sqnr_db": 30.0, "top1_agreement": 0.995},
}
"""What :meth:`Parity.problems` asks for. Integer kernels round where PyTorch's emulation does
too, but not always to the same side, so int8 is judged by noise power and by decisions."""


@dataclass(frozen=True)
class OutputParity:
    """One output, over all samples.

    Attributes:
        name: as in the file.
        max_abs_diff: largest absolute difference.
        max_abs: largest absolute value of PyTorch's output, to judge the difference by.
        sqnr_db: 10·log10(Σ reference² / Σ difference²); infinite when equal.
        top1_agreement: fraction of positions where the largest class is the same, or None
            when there are no classes to choose from. Classes are dimension 1 of (N, C) and
            (N, C, H, W) outputs, the last dimension of (N, T, C).
    """

    name: str
    max_abs_diff: float
    max_abs: float
    sqnr_db: float
    top1_agreement: float | None


@dataclass(frozen=True)
class Parity:
    """PyTorch against a runtime: the worst over all outputs.

    Attributes:
        max_abs_diff: see :class:`OutputParity`.
        sqnr_db: the lowest.
        top1_agreement: of the first output that has classes, or None.
        samples: rows of the first output that were compared.
        backend: which runtime.
        outputs: each output.
    """

    max_abs_diff: float
    sqnr_db: float
    top1_agreement: float | None
    samples: int
    backend: str
    outputs: tuple[OutputParity, ...]

    def problems(self, kind: Literal["fp32", "int8"]) -> list[str]:
        """Which of :data:`LIMITS` are missed, one sentence each; empty when it is proved."""
        limits = LIMITS[kind]
        found = []
        if "max_abs_diff" in limits and not self.max_abs_diff <= limits["max_abs_diff"]:
            found.append(
                f"largest difference {self.max_abs_diff:.2e}, allowed {limits['max_abs_diff']:.0e}"
            )
        if "sqnr_db" in limits and not self.sqnr_db >= limits["sqnr_db"]:
            found.append(f"SQNR {self.sqnr_db:.1f} dB, wanted {limits['sqnr_db']:.0f} dB")
        wanted = limits.get("top1_agreement", 0.0)
        if self.top1_agreement is not None and self.top1_agreement < wanted:
            found.append(f"same top-1 on {self.top1_agreement:.2%}, wanted {wanted:.1%}")
        return found

    def passed(self, kind: Literal["fp32", "int8"]) -> bool:
        """Whether nothing is missed."""
        return not self.problems(kind)

    def to_json(self) -> dict[str, Any]:
        """All fields; an infinite SQNR (equal outputs) becomes None."""
        data = asdict(self)
        for entry in (data, *data["outputs"]):
            entry["sqnr_db"] = entry["sqnr_db"] if math.isfinite(entry["sqnr_db"]) else None
        data["outputs"] = list(data["outputs"])
        return data

    def __str__(self) -> str:
        top1 = "" if self.top1_agreement is None else f", same top-1 {self.top1_agreement:.2%}"
        return (
            f"torch ↔ {self.backend}: max |Δ| {self.max_abs_diff:.2e}, "
            f"SQNR {self.sqnr_db:.1f} dB{top1} ({self.samples} samples)"
        )


@door
def parity(
    model: nn.Module,
    path: PathLike,
    batches: Iterable[Any],
    *,
    backend: str = "onnxruntime",
    threads: int = 1,
) -> Parity:
    """Run ``model`` in PyTorch and ``path`` in a runtime on the same batches and compare.

    Args:
        model: the module that was exported; runs in evaluation mode, flags restored.
        path: its ONNX file.
        batches: inputs of forward calls: tensors, ``(images, labels)`` pairs of a loader,
            tuples, dictionaries or :class:`slimkit.Inputs`. Different batch sizes are welcome.
        backend: a name in :data:`slimkit.runtime.sessions.BACKENDS`.
        threads: threads within one operator.

    Raises:
        InputError: there are no batches, or they do not fit the file, or the number or shape
            of outputs differ.
        ArtifactError, BackendError, MissingDependencyError: as
            :func:`slimkit.runtime.sessions.open_session`.
    """
    session = open_session(path, backend=backend, threads=threads)
    sums = [_Running(spec.name) for spec in session.outputs]
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with evaluation(model), torch.inference_mode():
        for batch in iterated(batches, where="batches"):
            inputs = in_signature_order(model, batch_inputs(batch, len(session.inputs)))
            named = named_outputs(inputs.to(device).run(model))
            expected = [tensor.detach().cpu().numpy() for _, tensor in named]
            for running, want, got in zip(
                sums, expected, _run(session, inputs, len(expected)), strict=True
            ):
                running.add(want, got)
    if not sums or not sums[0].rows:
        raise InputError("there are no batches to compare on", where="batches")
    outputs = tuple(running.result() for running in sums)
    agreements = [o.top1_agreement for o in outputs if o.top1_agreement is not None]
    return Parity(
        max_abs_diff=max(output.max_abs_diff for output in outputs),
        sqnr_db=min(output.sqnr_db for output in outputs),
        top1_agreement=agreements[0] if agreements else None,
        samples=sums[0].rows,
        backend=backend,
        outputs=outputs,
    )


def _run(session: Session, inputs: Inputs, count: int) -> list[Array]:
    arrays = [tensor.detach().cpu().numpy() for tensor in inputs.tensors()]
    results = session.run(arrays)
    if len(results) != count:
        raise InputError(f"the model returns {count} tensors, the file {len(results)}")
    return results


class _Running:
    """Sums over batches of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = 0
        self._signal = self._noise = 0.0
        self._largest = self._difference = 0.0
        self._same = self._positions = 0

    def add(self, expected: Array, got: Array) -> None:
        if expected.shape != got.shape:
            raise InputError(
                f"the model returns {expected.shape}, the file {got.shape}", where=self.name
            )
        want = expected.astype(np.float64)
        difference = got.astype(np.float64) - want
        self.rows += want.shape[0] if want.ndim else 1
        self._signal += float(np.square(want).sum())
        self._noise += float(np.square(difference).sum())
        if want.size:
            self._largest = max(self._largest, float(np.abs(want).max()))
            # NaN on one side only must not pass for agreement
            self._difference = float(np.maximum(self._difference, np.abs(difference).max()))
        axis = _class_axis(expected)
        if axis is not None and want.size:
            same = expected.argmax(axis) == got.argmax(axis)
            self._same += int(same.sum())
            self._positions += same.size

    def result(self) -> OutputParity:
        if self._noise == 0:
            sqnr = math.inf
        elif self._signal == 0 or math.isnan(self._noise):
            sqnr = -math.inf
        else:
            sqnr = 10 * math.log10(self._signal / self._noise)
        return OutputParity(
            name=self.name,
            max_abs_diff=self._difference,
            max_abs=self._largest,
            sqnr_db=sqnr,
            top1_agreement=self._same / self._positions if self._positions else None,
        )


def _class_axis(array: Array) -> int | None:
    """The dimension of the classes, None if there is none of at least two."""
    axis = {2: 1, 3: 2, 4: 1}.get(array.ndim)
    if axis is None or array.shape[axis] < 2 or array.dtype.kind != "f":
        return None
    return axis
