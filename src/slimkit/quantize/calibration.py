"""Post-training quantization: scales from a few batches of training data."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import DataError, InputError, SlimkitError
from slimkit.graph.capturing import capture
from slimkit.graph.computed_weights import computed_weights, make_plain
from slimkit.graph.folding import FusePlan, batch_norm_pairs
from slimkit.graph.patterns import Pattern, match_modules
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.limits import Limit
from slimkit.modules import copy_module
from slimkit.plan import apply
from slimkit.progress import LONG, ProgressDisplay
from slimkit.quantize.batches import Batches
from slimkit.quantize.evaluating import refuse_test_data
from slimkit.quantize.layer_choice.accuracy_control import Repair, accuracy_limit
from slimkit.quantize.layer_choice.float_budget import FloatBudget
from slimkit.quantize.methods.default_choice import usual_methods
from slimkit.quantize.methods.interface import (
    Method,
    Work,
    resolve_methods,
    run_methods,
)
from slimkit.quantize.observers.ranges import Observer, describe_observer, new_observer
from slimkit.quantize.outputs.check import output_check
from slimkit.quantize.planning.laying_out import lay_out
from slimkit.quantize.planning.requests import PerGroup, check_request
from slimkit.quantize.planning.roles import COMPILED
from slimkit.quantize.planning.suitability import check_network, compiled_modules, warn_of_nothing
from slimkit.quantize.quantizers.learned import with_scales
from slimkit.quantize.scheme import QuantPlan
from slimkit.quantize.targets import Target, resolve_target
from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["WeightBits", "attach", "calibrate", "ptq"]

WeightBits = int | Mapping[str, int]
"""Bits of all weights, or module pattern → bits; the first pattern that matches counts."""

_LARGEST_ACTIVATION = 20 << 20
"""Bytes: below 32 MiB glibc keeps freed memory; above, every activation waits for fresh pages."""


@door
def ptq(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    target: str | Target = "onnxruntime",
    mode: str = "static",
    granularity: str | PerGroup = "channel",
    observer: str | Observer = "minmax",
    skip: Pattern | Iterable[Pattern] = (),
    batches: int | None = None,
    weight_bits: WeightBits | None = None,
    methods: Iterable[str | Method] | None = None,
    limit: Limit | None = None,
    progress: bool = True,
) -> QuantizedModel:
    """Quantize a trained network without training it.

    Args:
        model: any module; it is copied, not changed. Batch norms are folded into the layers in
            front of them, and layers that compute their weight from parameters, as those with
            weight standardisation do, become plain ones.
        example_inputs: one call; see :class:`slimkit.Inputs`.
        calibration: batches of training data: tensors, (tensor, label) pairs, dictionaries or
            Inputs, prepared as for training; dimension 0 counts the examples. A loader whose
            ``role`` is ``"test"`` is refused. Only ``mode="static"`` needs it.
        target: name in :data:`~slimkit.quantize.targets.TARGETS`, or a Target.
        mode: scales of activations are ``"static"``, from calibration; or ``"dynamic"``, computed
            from each batch as it comes; or there are none and only ``"weights"`` are integers.
        granularity: one weight scale per output ``"channel"``, per ``"tensor"``, or per
            ``"group"`` of 32 inputs of each output channel, ``PerGroup(64)`` for other sizes
            (linear layers and 1×1 convolutions whose inputs divide into groups; the other layers
            per channel; only ``mode="weights"``).
        observer: how ranges of activations are found: a name in
            :data:`~slimkit.quantize.observers.ranges.OBSERVERS`, or an observer with settings
            such as ``Percentile(percentile=99.9)``.
        skip: modules that stay in float: patterns on module paths or class names.
        batches: use so many batches; all by default.
        weight_bits: 2 to 8 for all weights, or module pattern → bits (the first that matches);
            what is not named has the target's.
        methods: what else to do, in this order: names in
            :data:`~slimkit.quantize.methods.interface.METHODS`, or methods with settings of their
            own. By default, if there is calibration data, ``gptq`` and ``bias_correction`` for
            weights with one scale per tensor; for fewer than 8 bits these, behind the activation
            function, and ``bias_tuning``; else nothing.
        limit: a limit of what quantization may cost, or a budget of what may stay in float: what
            stays in float for it is chosen, and the plan names it; see :class:`Limit`.
        progress: show on standard error how far it is, and how much time is left, in what takes
            over ten seconds.

    Returns:
        A copy in evaluation mode; its ``plan.explain()`` says what is integer and what not. If
        there is no limit and its outputs lie less than 15 dB above their difference from those of
        the float network, a warning, in the plan too, names the layers that round most away.

    Raises:
        EvaluationError: the limit's ``evaluate`` failed or gave no finite number; what was
            quantized by then is in its ``model``.
        UnknownNameError, PatternError, InputError: an argument is not valid.
        DataError: calibration data is empty, of another shape, not finite, or test data.
        CaptureError: the network fails on ``example_inputs``.
    """
    chosen = [] if methods is None else resolve_methods(methods)
    resolved = resolve_target(target)
    example = as_inputs(example_inputs)
    if not isinstance(limit, Limit | None):
        raise InputError(
            f"expected a Limit, got {limit!r}", where="limit", hint="Limit(min_sqnr=20)"
        )
    if limit is not None and limit.evaluate is not None:
        refuse_test_data(limit.evaluate)
    budget = FloatBudget(limit.max_float) if limit is not None and limit.max_float else None
    needed = None if limit is None or limit.max_drop is not None else limit.given()[0]
    if calibration is None and (mode == "static" or needed):
        what = "static scales of activations need" if mode == "static" else f"{needed} needs"
        raise InputError(
            f"{what} data",
            where="calibration",
            hint="pass batches of training data"
            + (", or use mode='dynamic'" if mode == "static" else ""),
        )
    quantized = attach(
        model,
        example_inputs,
        target=resolved,
        mode=mode,
        granularity=granularity,
        observer=observer,
        skip=skip,
        weight_bits=weight_bits,
    )
    if methods is None and calibration is not None:
        chosen = usual_methods(quantized.plan)
    goal = None if limit is None else accuracy_limit(limit, quantized)
    given = () if calibration is None else calibration
    data = Batches(given, example, batches, keep=bool(chosen or limit))

    def work_on(network: QuantizedModel) -> Work:
        def ranges() -> None:
            if mode == "static":
                calibrate(network, data, observer=observer, progress=progress)

        return Work(network, example.to(_device(network)), data, ranges, progress)

    def adjust(network: QuantizedModel) -> None:
        run_methods(chosen, "after", work_on(network))

    work = work_on(quantized.eval())
    run_methods(chosen, "before", work)
    work.recalibrate()
    if goal is None:
        check = output_check(work)
        if budget is not None:
            budget.spend(work, target=resolved)
        run_methods(chosen, "after", work)
        if check is not None:
            check.warn(quantized)
        return quantized.eval()
    originals = goal.remembered(work) if chosen else {}
    again = goal.evaluate is None and any(method.when == "after" for method in chosen)
    repair = Repair(copy_module(quantized), adjust) if again else None
    run_methods(chosen, "after", work)
    return goal.keep(work, target=resolved, originals=originals, repair=repair).eval()


def attach(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    target: str | Target,
    granularity: str | PerGroup,
    observer: str | Observer,
    mode: str = "static",
    skip: Pattern | Iterable[Pattern],
    weight_bits: WeightBits | None = None,
    scales: str = "observed",
) -> QuantizedModel:
    """Plan, and apply the plan to a copy of ``model``; scales are still unknown.

    Raises:
        UnknownNameError, PatternError, InputError, CaptureError: as for :func:`ptq`.
    """
    chosen = resolve_target(target)
    new_observer(observer)
    if isinstance(model, QuantizedModel):
        raise InputError("the model is quantized already", where="model", hint="pass model.model")
    check_network(model)
    request = check_request(
        chosen,
        mode=mode,
        granularity=granularity,
        weight_bits=_bits_by_module(model, weight_bits),
    )
    skipped = match_modules(model, skip, where="skip") if skip else set()
    original = copy_module(model)
    graph = capture(original, example_inputs)
    plain = computed_weights(original, graph)
    folded = make_plain(copy_module(original), plain)
    if plain:
        graph = capture(folded, example_inputs)
    folds = tuple(batch_norm_pairs(folded, graph))
    FusePlan(folds).apply_to(folded)
    graph = capture(folded, example_inputs)
    compiled = compiled_modules(model)
    layout = lay_out(graph, chosen, request, skipped=skipped, compiled=compiled)
    told = warn_of_nothing(
        layout.decisions, layout.quantizers, target=chosen.name, skipped=bool(skipped)
    )
    plan = QuantPlan(
        target=chosen.name,
        granularity=request.granularity,
        observer=describe_observer(observer),
        folds=folds,
        quantizers=tuple(layout.quantizers),
        calls=layout.calls,
        decisions=tuple(layout.decisions),
        warnings=(*layout.warnings, *(f"{path}: {COMPILED}" for path in compiled), *told),
        mode=mode,
        opset=chosen.opset,
        biases="float16" if chosen.compact else chosen.biases,
        plain=plain,
        table=graph.table,
    )
    quantized = apply(original, with_scales(plan, scales))
    if not isinstance(quantized, QuantizedModel):  # what QuantPlan.apply_to returns
        raise InputError("the plan gave no quantized model", where="model")
    return quantized


def _bits_by_module(model: nn.Module, weight_bits: WeightBits | None) -> dict[str, int]:
    if weight_bits is None:
        return {}
    if isinstance(weight_bits, int):
        return {path: weight_bits for path, _ in model.named_modules()}
    if not isinstance(weight_bits, Mapping):
        raise InputError(
            f"expected a number or pattern → number, got {weight_bits!r}", where="weight_bits"
        )
    found: dict[str, int] = {}
    for pattern, bits in weight_bits.items():
        for path in match_modules(model, [pattern], where="weight_bits"):
            found.setdefault(path, bits)
    return found


def calibrate(
    quantized: QuantizedModel,
    batches: Iterable[Inputs],
    *,
    observer: str | Observer,
    progress: bool = False,
) -> None:
    """Find the activation ranges of the float network on ``batches``, in place.

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
    parts = _Parts(
        quantizers.values(), divisible=getattr(new_observer(observer), "divisible", False)
    )
    total = operator.length_hint(batches)
    try:
        with ProgressDisplay(
            total, 0, label="calibration", enabled=progress and total > 0, patience=LONG
        ) as show:
            for number, inputs in enumerate(batches, start=1):
                with torch.no_grad(), quantized.recording_calls(called):
                    parts.run(quantized, inputs.to(device), number)
                show.step(number, "batches")
        _adopt_ranges(quantized)
    finally:
        parts.see_no_more()
        for quantizer in quantizers.values():
            quantizer.observe_with(None)
        quantized.set_rounding(True)
        quantized.train(training)
    quantized.refresh_weights()
    _restrict(quantized, called)


class _Parts:
    """Batches divided so that no activation is larger than :data:`_LARGEST_ACTIVATION`.

    Args:
        quantizers: that see the activations of the first batch, which is not divided.
        divisible: whether there are to be parts at all.
    """

    def __init__(self, quantizers: Iterable[nn.Module], *, divisible: bool) -> None:
        self._divisible, self._largest = divisible, 0
        hooks = quantizers if divisible else ()
        self._hooks = [quantizer.register_forward_pre_hook(self._see) for quantizer in hooks]

    def run(self, quantized: QuantizedModel, inputs: Inputs, number: int) -> None:
        """Run one batch in parts, or in one piece if the network cannot do with less.

        Raises:
            SlimkitError: it does not go through the network.
        """
        parts = self._of(inputs)
        try:
            for part in parts:
                _run(quantized, part, number)
        except SlimkitError:
            if len(parts) == 1:
                raise
            self._divisible = False
            _run(quantized, inputs, number)
        if self._hooks:
            self.see_no_more()
            self._largest = -(-self._largest // (inputs.examples or 1))

    def see_no_more(self) -> None:
        """Remove what looks at the activations."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _of(self, inputs: Inputs) -> list[Inputs]:
        if not self._divisible or not self._largest:
            return [inputs]
        return inputs.split(max(1, _LARGEST_ACTIVATION // self._largest))

    def _see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._largest = max(self._largest, args[0].numel() * args[0].element_size())


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
    ready |= {spec.name for spec in quantized.plan.quantizers if not spec.calibrated}
    plan = quantized.plan.restricted(called=called, ready=ready)
    if plan is quantized.plan:
        return
    for message in plan.warnings[len(quantized.plan.warnings) :]:
        warnings.warn(message, stacklevel=4)
    quantized.replace_plan(plan)


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
