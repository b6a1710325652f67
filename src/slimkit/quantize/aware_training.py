"""Quantization-aware training: the network learns with the rounding in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from slimkit.doors import door
from slimkit.errors import InputError
from slimkit.graph.patterns import Pattern
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.quantize.batches import Batches
from slimkit.quantize.calibration import WeightBits, attach, calibrate
from slimkit.quantize.observers.ranges import Observer
from slimkit.quantize.planning.requests import PerGroup
from slimkit.quantize.targets import Target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["qat"]


@door
def qat(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    target: str | Target = "onnxruntime",
    mode: str = "static",
    granularity: str | PerGroup = "channel",
    observer: str | Observer | None = None,
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
    observe_steps: int | None = None,
    weight_bits: WeightBits | None = None,
    scales: str = "observed",
) -> QuantizedModel:
    """Attach quantizers to a copy of ``model`` that then trains in any loop.

    Batch norms are folded first, so fine-tune with a small learning rate (about a hundredth
    of that of the original training; with four bits or fewer, up to half of it). Zeros of a
    pruned weight stay zero as long as the weight is zero.

    Args:
        model: any module; it is copied, not changed.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data for the first activation ranges.
        target: name in :data:`~slimkit.quantize.targets.TARGETS`, or a Target.
        mode: as for :func:`~slimkit.quantize.ptq`; only ``"static"`` observes ranges.
        granularity: as for :func:`~slimkit.quantize.ptq`.
        observer: how ``calibration`` is summarised; as for :func:`~slimkit.quantize.ptq`.
            Default: ``"moving_average"``; for learned scales ``"mse"``, since with few bits they
            do not find the way back from too wide a range.
        skip: modules that stay in float: patterns on module paths or class names.
        batches: use so many of its batches; all by default.
        observe_steps: number of training forwards during which the ranges follow a moving
            average of the data; then they are frozen. Default: 0 with ``calibration``, else
            200. :meth:`~slimkit.quantize.wrapper.QuantizedModel.freeze_observers` ends it.
        weight_bits: as for :func:`~slimkit.quantize.ptq`.
        scales: ``"observed"``: ranges of activations as observed, of weights their largest
            magnitude. ``"lsq"``: all scales (and zero points of activations with negative
            values) start there and are parameters, trained with the weights (LSQ, Esser et al.,
            2020, https://arxiv.org/abs/1902.08153; LSQ+, Bhalgat et al., 2020,
            https://arxiv.org/abs/2004.09576). ``"pact"``: the upper bounds behind ReLUs are
            (PACT, Choi et al., 2018, https://arxiv.org/abs/1805.06085).

    Returns:
        A copy in training mode.

    Raises:
        UnknownNameError, PatternError, InputError, DataError, CaptureError: as for ptq.
    """
    if observer is None:
        learned = scales != "observed" and calibration is not None
        observer = "mse" if learned else "moving_average"
    if observe_steps is None:
        observe_steps = 200 if calibration is None and mode == "static" else 0
    blind = observe_steps == 0 and calibration is None and mode == "static"
    if observe_steps < 0 or blind:
        raise InputError(
            f"{observe_steps} steps give no activation ranges without calibration data",
            where="observe_steps",
        )
    quantized = attach(
        model,
        example_inputs,
        target=target,
        mode=mode,
        granularity=granularity,
        observer=observer,
        skip=skip,
        weight_bits=weight_bits,
        scales=scales,
    )
    if calibration is not None and mode == "static":
        data = Batches(calibration, as_inputs(example_inputs), batches)
        calibrate(quantized, data, observer=observer)
    quantized.observe_for(observe_steps)
    return quantized.train()
