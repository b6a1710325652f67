"""Post-training quantization: scales from a few batches of training data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.errors import DataError, InputError, SlimkitError, nearest
from slimkit.graph.capturing import capture
from slimkit.graph.folding import FusePlan, batch_norm_pairs
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.plan import apply
from slimkit.quantize.observers import Observer, describe_observer, new_observer
from slimkit.quantize.planning import lay_out
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.targets import Target, resolve_target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["attach", "calibrate", "ptq"]

GRANULARITIES = ("channel", "tensor")


def ptq(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any],
    target: str | Target = "onnxruntime",
    granularity: str = "channel",
    observer: str | Observer = "minmax",
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
) -> QuantizedModel:
    """Quantize a trained network without training it.

    Args:
        model: any module; it is copied, not changed.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data: tensors, (tensor, label) pairs, dictionaries or
            Inputs, prepared as for training. A loader whose ``role`` is ``"test"`` is refused.
        target: name in :data:`~slimkit.quantize.targets.TARGETS`, or a Target.
        granularity: one weight scale per output ``"channel"`` or per ``"tensor"``.
        observer: how ranges of activations are found: a name in
            :data:`~slimkit.quantize.observers.OBSERVERS`, or an observer with settings such as
            ``Percentile(percentile=99.9)``.
        skip: modules that stay in float: patterns on module paths or class names.
        batches: use so many batches; all by default.

    Returns:
        A copy in evaluation mode; its ``plan.explain()`` says what is integer and what not.

    Raises:
        UnknownNameError, PatternError, InputError: an argument is not valid.
        DataError: calibration data is empty, of another shape, not finite, or test data.
        CaptureError: the network fails on ``example_inputs``.
    """
    quantized = attach(
        model,
        example_inputs,
        target=target,
        granularity=granularity,
        observer=observer,
        skip=skip,
    )
    calibrate(quantized, example_inputs, calibration, observer=observer, batches=batches)
    return quantized.eval()


def attach(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    target: str | Target,
    granularity: str,
    observer: str | Observer,
    skip: Pattern | Iterable[Pattern],
) -> QuantizedModel:
    """Plan, and apply the plan to a copy of ``model``; scales are still unknown.

    Raises:
        UnknownNameError, PatternError, InputError, CaptureError: as for :func:`ptq`.
    """
    chosen = resolve_target(target)
    new_observer(observer)
    if granularity not in GRANULARITIES:
        hint = nearest(str(granularity), GRANULARITIES)
        raise InputError(f"unknown granularity {granularity!r}", where="granularity", hint=hint)
    if isinstance(model, QuantizedModel):
        raise InputError("the model is quantized already", where="model", hint="pass model.model")
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}", where="model")
    skipped = match_modules(model, skip, where="skip") if skip else set()
    original = copy.deepcopy(model)
    folds = tuple(batch_norm_pairs(original, capture(original, example_inputs)))
    folded = FusePlan(folds).apply_to(copy.deepcopy(original))
    layout = lay_out(
        capture(folded, example_inputs), chosen, granularity=granularity, skipped=skipped
    )
    plan = QuantPlan(
        target=chosen.name,
        granularity=granularity,
        observer=describe_observer(observer),
        folds=folds,
        quantizers=tuple(layout.quantizers),
        calls=layout.calls,
        decisions=tuple(layout.decisions),
    )
    quantized = apply(original, plan)
    if not isinstance(quantized, QuantizedModel):  # what QuantPlan.apply_to returns
        raise InputError("the plan gave no quantized model", where="model")
    return quantized


def calibrate(
    quantized: QuantizedModel,
    example_inputs: ExampleInputs,
    calibration: Iterable[Any],
    *,
    observer: str | Observer,
    batches: int | None = None,
) -> None:
    """Find the activation ranges of the float network on ``calibration``, in place.

    Calls that no batch reaches are taken out of the plan with a warning.

    Raises:
        DataError: as for :func:`ptq`.
    """
    training = quantized.training
    device = _device(quantized)
    quantizers = quantized.activation_quantizers()
    called: set[str] = set()
    for quantizer in quantizers.values():
        quantizer.observe_with(observer)
    quantized.eval()
    quantized.set_rounding(False)
    for quantizer in quantizers.values():
        quantizer.observing = True
    try:
        for number, inputs in enumerate(
            _batches(calibration, as_inputs(example_inputs), batches), start=1
        ):
            with torch.no_grad(), quantized.recording_calls(called):
                _run(quantized, inputs.to(device), number)
        _adopt_ranges(quantized)
    finally:
        for quantizer in quantizers.values():
            quantizer.observe_with(None)
        quantized.set_rounding(True)
        quantized.train(training)
    _restrict(quantized, called)


def _run(quantized: QuantizedModel, inputs: Inputs, number: int) -> None:
    try:
        inputs.call(quantized)
    except SlimkitError:
        raise
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in inputs.tensors()]
        raise DataError(
            f"batch {number} with shapes {shapes} does not go through the model: {error}",
            where="calibration",
        ) from error


def _adopt_ranges(quantized: QuantizedModel) -> None:
    for name, quantizer in quantized.activation_quantizers().items():
        quantizer.adopt_range()
        bounds = torch.stack([quantizer.low, quantizer.high])
        if not bool(torch.isfinite(bounds).all()):
            raise DataError(
                f"an activation is not finite: {quantizer.low.item()} … {quantizer.high.item()}",
                where=name,
                hint="check the weights of the layers before it",
            )


def _restrict(quantized: QuantizedModel, called: set[str]) -> None:
    """Take what never ran out of the plan, and warn."""
    ready = {name for name, q in quantized.activation_quantizers().items() if q.ready}
    ready |= {spec.name for spec in quantized.plan.quantizers if spec.parameter is not None}
    plan = quantized.plan.restricted(called=called, ready=ready)
    if plan is quantized.plan:
        return
    for message in plan.warnings[len(quantized.plan.warnings) :]:
        warnings.warn(message, stacklevel=4)
    quantized.replace_plan(plan)


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


# --- what counts as a batch -----------------------------------------------------------------


def _batches(calibration: Iterable[Any], example: Inputs, limit: int | None) -> Iterator[Inputs]:
    """Checked batches as inputs of the model.

    Raises:
        DataError: not iterable, empty, fewer than ``limit``, test data, or a bad batch.
    """
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
        raise DataError(f"expected batches, got {type(calibration).__name__}", where="calibration")
    count = 0
    for batch in calibration:
        count += 1
        inputs = _as_call(batch, example, count)
        _check_batch(inputs, example, count)
        yield inputs
        if count == limit:
            return
    if count == 0:
        raise DataError("there is no batch in it", where="calibration")
    if limit is not None:
        raise DataError(f"it has {count} batches, {limit} were asked for", where="calibration")


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
