"""The teacher's side: a frozen, folded copy, run in bf16 where that is fast and good enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from slimkit.distill.recording.answer_cache import AnswerCache
from slimkit.distill.recording.recorder import Recorder, main_tensor, probing, run
from slimkit.distill.recording.records import OUTPUT, Tap, find_taps, tap_of
from slimkit.errors import CaptureError, InputError, ModelError, PlanError, nearest
from slimkit.graph.capturing import capture
from slimkit.graph.folding import FusePlan, batch_norm_pairs
from slimkit.inputs import Inputs
from slimkit.modules import copy_module
from slimkit.runtime.surroundings import multiplies_bf16

__all__ = ["FrozenTeacher", "TeacherPrecision"]

TeacherPrecision = Literal["auto", "fp32", "bf16", "autocast"]
"""bf16 weights and activations, fp32 weights under bf16 autocast, fp32, or what is best here.

``"auto"`` decides by what the processor can do and by the answers, not by timing: a run that
is repeated or resumed on the same machine decides the same.
"""

_MIN_AGREEMENT = 0.99
"""Share of equal arg-maxes, bf16 against float32, on the first batch. Rounding to 8 bits changes
the class only where two are nearly equal; more changes mean an overflow or a cancellation."""


@dataclass(frozen=True)
class _Runner:
    """One way to run the teacher.

    Attributes:
        model: in eval mode, frozen, in its precision.
        precision: one of ``fp32``, ``bf16``, ``autocast``.
        channels_last: whether 4-D inputs are laid out as (N, H, W, C).
    """

    model: nn.Module
    precision: str
    channels_last: bool

    def __call__(self, inputs: Inputs) -> Any:
        inputs = inputs.map(self._prepared)
        device = inputs.tensors()[0].device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=self.precision == "autocast")
        with torch.no_grad(), autocast:
            return inputs.run(self.model)

    def _prepared(self, tensor: Tensor) -> Tensor:
        if self.precision == "bf16" and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


class FrozenTeacher:
    """A copy of the teacher that never learns, and what it says about a batch.

    The caller's teacher is not touched: the copy is put into eval mode without gradients, its
    batch norms are folded, and its precision is chosen on the first batch.

    Args:
        teacher: any module, in any mode.
        layers: module paths to record, ``""`` for the output; or taps.
        precision: ``"auto"`` takes bf16 where the device multiplies it natively and the arg-max
            agrees with float32 on ≥ 99 % of the first batch; another value is taken as it is.
        scope: entered around every forward whose records are kept.
        cache: keeps answers to images that come again.

    Attributes:
        precision: as given, and what was chosen after the first batch.

    Raises:
        UnknownNameError: a layer does not exist.
        InputError: unknown precision.
        ModelError: the teacher cannot be copied.
    """

    def __init__(
        self,
        teacher: nn.Module,
        layers: Iterable[str | Tap],
        precision: TeacherPrecision = "auto",
        *,
        scope: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        cache: AnswerCache | None = None,
    ) -> None:
        self._taps = sorted({tap_of(layer) for layer in layers}, key=lambda tap: tap.key)
        for tap in self._taps:
            if tap.kind == "module" and tap.name != OUTPUT:
                find_taps(tap.name, teacher, who="teacher")
        self._scope, self._cache = scope, cache
        if precision not in get_args(TeacherPrecision):
            hint = nearest(str(precision), get_args(TeacherPrecision))
            raise InputError(f"unknown precision {precision!r}", where="precision", hint=hint)
        self.precision: str = precision
        self._copy = _frozen_copy(teacher)
        floating = (p.dtype for p in self._copy.parameters() if p.is_floating_point())
        self._dtype = next(floating, torch.float32)
        self._runner: _Runner | None = None
        self._recorder: Recorder | None = None

    def use(self, precision: str) -> None:
        """Run in ``precision`` from now on; ``"auto"`` decides anew on the next batch."""
        if precision == self.precision:
            return
        self.close()
        self.precision, self._runner, self._recorder = precision, None, None

    def probe(self, inputs: Inputs) -> dict[str, Tensor]:
        """Records in float32 without choosing a precision; for shapes."""
        inputs = self._cast(inputs)
        recorder = Recorder(self._copy, self._taps)
        device = inputs.tensors()[0].device
        try:
            with probing(self._copy):
                run(self._copy.to(device), inputs, who="teacher")
            return dict(recorder.records)
        finally:
            recorder.close()

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """Run on ``inputs``; layer → float32 record without gradient, ``""`` for the output."""
        return self._run(inputs) if self._cache is None else self._cache(inputs, self._run)

    def _run(self, inputs: Inputs) -> dict[str, Tensor]:
        inputs = self._cast(inputs)
        if self._runner is None:
            self._runner = self._prepare(inputs)
            self._recorder = Recorder(self._runner.model, self._taps)
            self.precision = self._runner.precision
        recorder = self._recorder
        with self._scope():
            self._runner(inputs)
        if recorder is None:
            return {}
        records = {layer: record.float() for layer, record in recorder.records.items()}
        recorder.clear()
        missing = [tap for tap in self._taps if tap.key not in records]
        if missing:
            raise ModelError(f"{missing[0].absent} in its forward", where="teacher")
        return records

    @property
    def copy(self) -> nn.Module:
        """The frozen network as it is before folding."""
        return self._copy

    def close(self) -> None:
        """Remove the hooks from the copy."""
        if self._recorder is not None:
            self._recorder.close()

    def _cast(self, inputs: Inputs) -> Inputs:
        """Inputs in the teacher's own type: a student may train in pure bf16."""
        return inputs.map(lambda t: t.to(self._dtype) if t.is_floating_point() else t)

    def _prepare(self, inputs: Inputs) -> _Runner:
        device = inputs.tensors()[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self._prepared_for(inputs, device)

    def _prepared_for(self, inputs: Inputs, device: torch.device) -> _Runner:
        # in a random state of its own: a resumed run tries the teacher out again, mid-way
        with probing(self._copy):
            run(self._copy.to(device), inputs, who="teacher")
        model = _folded(self._copy, inputs, self._taps)
        images = any(tensor.dim() == 4 for tensor in inputs.tensors())
        channels_last = images and any(isinstance(m, nn.Conv2d) for m in model.modules())
        return _choose(model, inputs, self.precision, channels_last)


def _frozen_copy(teacher: nn.Module) -> nn.Module:
    return copy_module(teacher, where="teacher").eval().requires_grad_(False)


def _folded(model: nn.Module, inputs: Inputs, taps: Iterable[Tap]) -> nn.Module:
    """``model`` with batch norms folded, except where a record would change its meaning."""
    taps = list(taps)
    if any(tap.kind == "function" for tap in taps):
        return model  # which calls are made, and with what, is what is recorded
    try:
        pairs = batch_norm_pairs(model, capture(model, inputs))
        pairs = [pair for pair in pairs if not any(_is_changed(tap, *pair) for tap in taps)]
        return FusePlan(tuple(pairs)).apply_to(model).eval() if pairs else model
    except (CaptureError, PlanError):
        return model  # what cannot be followed runs as it is


def _is_changed(tap: Tap, layer: str, norm: str) -> bool:
    """Whether folding a batch norm into a layer changes what is recorded at ``tap``."""
    if tap.kind == "parameter":
        return tap.name.rpartition(".")[0] in {layer, norm}
    # after folding, the convolution's own output is the batch norm's
    return tap.name == (norm if tap.part == "input" else layer)


def _runner(model: nn.Module, precision: str, channels_last: bool) -> _Runner:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if channels_last else torch.preserve_format
    if precision == "bf16":
        model = copy_module(model, where="teacher").to(dtype)
    return _Runner(model.to(memory_format=layout), precision, channels_last)


def _choose(model: nn.Module, inputs: Inputs, precision: str, channels_last: bool) -> _Runner:
    """The lowest precision that this machine is fast in and that agrees with float32."""
    if precision != "auto":
        return _runner(model, precision, channels_last)
    exact = _runner(model, "fp32", channels_last)
    if not multiplies_bf16(inputs.tensors()[0].device):
        return exact
    try:
        reference = main_tensor(exact(inputs), where="teacher")
    except ModelError:  # a detector's boxes: nothing to judge the agreement by
        return exact
    for name in ("bf16", "autocast"):
        candidate = _runner(model, name, channels_last)
        # a precision that some operator of the teacher lacks is no candidate
        with contextlib.suppress(RuntimeError, NotImplementedError):
            answer = main_tensor(candidate(inputs), where="teacher")
            if _agreement(answer, reference) >= _MIN_AGREEMENT:
                return candidate
    return exact


def _agreement(answer: Tensor, reference: Tensor) -> float:
    """Share of equal arg-maxes over dim 1; 0 when something is not finite."""
    if not bool(torch.isfinite(answer).all()):
        return 0.0
    dim = 1 if reference.dim() > 1 else 0
    return (answer.argmax(dim) == reference.argmax(dim)).float().mean().item()
