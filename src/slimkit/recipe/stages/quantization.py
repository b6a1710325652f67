"""``type: ptq`` and ``type: qat``: integers by calibration alone, or with training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimkit.errors import DataError, InputError
from slimkit.limits import KINDS, Limit
from slimkit.recipe.schema.fields import OneOf, wrong
from slimkit.recipe.schema.methods import MethodField, build_method
from slimkit.recipe.stages.interface import Stage, StageContext, StageResult
from slimkit.recipe.stages.teachers import TEACHING, DistillOptions, check_distillation
from slimkit.recipe.stages.training import train_model, training_facts
from slimkit.tasks.running import device_of
from slimkit.tasks.splits import first_batches, some_examples
from slimkit.train.settings import MOST_EPOCHS, MOST_RATE, TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from slimkit.inputs import Inputs
    from slimkit.quantize import QuantizedModel

__all__ = ["PtqStage", "QatStage", "QuantizeOptions", "ValidationMetric"]

OBSERVER = MethodField("slimkit.quantize:OBSERVERS")


METHOD = MethodField("slimkit.quantize:METHODS")
Bits = Annotated[int, Field(ge=2, le=8)]
PICTURED_SAMPLES = 8
"""Whose activations the report shows before and after rounding; both are held in memory."""


class QuantizeOptions(BaseModel):
    """How a network is quantized.

    Attributes:
        target: the runtime whose integer operators the scheme must fit.
        mode: scales of activations from calibration (static), from each batch (dynamic), or
            integer weights only (weights).
        granularity: weight scales per output channel, one per tensor, or one per group of inputs.
        group_size: inputs of a group; 32 by default.
        observer: how ranges of activations are taken from calibration batches; a name, or a
            mapping with its settings.
        skip: patterns of layers that stay in float.
        batches: calibration batches, taken from the training split without augmentation.
        weight_bits: of all weights, or module pattern → bits; the target's by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Annotated[str, OneOf("slimkit.quantize:TARGETS")] = "onnxruntime"
    mode: Literal["static", "dynamic", "weights"] = "static"
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    observer: Annotated[str | BaseModel, OBSERVER] = "minmax"
    skip: tuple[str, ...] = ()
    batches: int = Field(default=8, ge=1, le=1_000_000)
    weight_bits: Bits | dict[str, Bits] | None = None

    @model_validator(mode="after")
    def _observer_takes_its_settings(self) -> Self:
        try:
            self.chosen_observer()
        except InputError as error:
            path = f"observer.{error.where}" if error.where else "observer"
            raise wrong(error.message, error.hint, path=path) from error
        return self

    def chosen_observer(self) -> Any:
        """The name, or an observer with the settings of the recipe."""
        if isinstance(self.observer, str):
            return self.observer
        built = build_method(OBSERVER, self.observer, {})
        return built() if isinstance(built, type) else built

    def arguments(self, context: StageContext) -> dict[str, Any]:
        """Keyword arguments for :func:`slimkit.quantize.ptq` and ``qat``."""
        from slimkit.quantize.planning.requests import granularity_of

        return {
            "calibration": CalibrationBatches(context, self.batches),
            "target": self.target,
            "mode": self.mode,
            "granularity": granularity_of(self.granularity, self.group_size),
            "observer": self.chosen_observer(),
            "skip": self.skip,
            "weight_bits": self.weight_bits,
        }

    def facts(self) -> dict[str, Any]:
        """See the class ``Stage``: the target as data, and for this processor."""
        from slimkit.quantize.targets import resolve_target

        return {"target": resolve_target(self.target)}


class CalibrationBatches:
    """The first ``count`` batches of training samples, as the quantizer wants to be shown them.

    Attributes:
        role: the split it reads, which the quantizer checks.
    """

    def __init__(self, context: StageContext, count: int) -> None:
        self.loader = context.splits.calibration
        self.count = 1 if context.max_steps is not None else count
        self.role = self.loader.role

    def __iter__(self) -> Iterator[Inputs]:
        return (batch.inputs for batch in first_batches(self.loader, self.count))


class ValidationMetric:
    """The task's metric on the validation samples; of a smoke run on the first batch.

    Attributes:
        role: the split it reads, which the quantizer checks.

    Raises:
        DataError: there is no validation split.
    """

    def __init__(self, context: StageContext) -> None:
        loader = context.splits.validation
        if loader is None:
            raise DataError(
                "it is measured on validation data, and there are none",
                where="max_drop",
                hint="data.validation: 0.1",
            )
        self._loader = loader
        self._task = context.task
        self._count = len(loader) if context.max_steps is None else 1
        self.role = loader.role

    def __call__(self, model: nn.Module) -> float:
        """More is better: a metric of which less is better comes with its sign turned."""
        scores = self._task.evaluate(model, first_batches(self._loader, self._count))
        return self._task.metric.goodness(scores[self._task.metric.name])


class PtqStage(QuantizeOptions, Stage):
    """Post-training quantization: calibrated on training images, no training.

    Attributes:
        methods: what else to do beside calibration, in this order; null leaves it to
            :func:`slimkit.quantize.ptq`.
        max_drop: as few layers stay in float as it takes for the task's metric on validation
            images to fall by no more than so many points; null quantizes everything.
        min_sqnr: the same without labels: the outputs on the calibration images must lie so many dB
            above their difference from the float network's.
        max_float: share of the network's multiply-adds that may stay in float, in the layers where
            that helps the outputs on the calibration images most; a budget instead of a limit.
        fewest: what is left in float as little as possible for either limit: layers, or the
            multiply-adds in them.
    """

    version: ClassVar[int] = 5
    exclusive: ClassVar = (KINDS,)
    type: Literal["ptq"] = "ptq"
    methods: tuple[Annotated[Any, METHOD], ...] | None = None
    max_drop: float | None = Field(default=None, ge=0, le=1e6, allow_inf_nan=False)
    min_sqnr: float | None = Field(default=None, ge=0, lt=200)
    max_float: float | None = Field(default=None, gt=0, le=1)
    fewest: Literal["layers", "macs"] = "layers"

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        first, *others = [name for name in KINDS if getattr(self, name) is not None] or [""]
        if others:
            message = f"{first} says already how much stays in float"
            raise wrong(message, "leave one of them out", path=others[0])
        return self

    def limit(self, context: StageContext) -> Limit | None:
        """What may stay in float, and why; None quantizes everything."""
        given = {name: getattr(self, name) for name in KINDS}
        if all(value is None for value in given.values()):
            return None
        evaluate = None if self.max_drop is None else ValidationMetric(context)
        return Limit(**given, fewest=self.fewest, evaluate=evaluate)

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.quantize import ptq

        quantized = ptq(
            model.eval(),
            context.example_inputs,
            methods=None
            if self.methods is None
            else [build_method(METHOD, choice, {}) for choice in self.methods],
            limit=self.limit(context),
            progress=context.progress,
            **self.arguments(context),
        )
        return StageResult(quantized, _told(quantized, context, original=model))

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks patterns, the target, and that there is data to judge by."""
        _check(model, self)
        if self.max_drop is not None:
            ValidationMetric(context)
        return model


class QatStage(QuantizeOptions, DistillOptions, TrainSettings, Stage):
    """Quantization-aware training, started from calibrated scales.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage, and a teacher
    can be named as in ``type: train``. Four have defaults of their own: batch norms are folded,
    so weights are larger and nothing rescales gradients (``lr``, ``clip_grad_norm``), scales
    need the digits of float32 (``precision``), and little is left to learn (``epochs``).

    Attributes:
        scales: observed, or trained with the weights; see :func:`slimkit.quantize.qat`. Trained
            ones start from the ``mse`` observer unless the recipe names another.
    """

    version: ClassVar[int] = 2
    exclusive: ClassVar = TEACHING
    type: Literal["qat"] = "qat"
    epochs: Annotated[float, Field(gt=0, le=MOST_EPOCHS)] = 2
    lr: Annotated[float, Field(gt=0, le=MOST_RATE)] = 5e-4
    clip_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    scales: Literal["observed", "lsq", "pact"] = "observed"

    @model_validator(mode="before")
    @classmethod
    def _learned_scales_start_from_small_errors(cls, data: Any) -> Any:
        learned = isinstance(data, Mapping) and data.get("scales", "observed") != "observed"
        return {"observer": "mse", **data} if learned else data

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.quantize import qat

        arguments = self.arguments(context)
        quantized = qat(model.eval(), context.example_inputs, scales=self.scales, **arguments)
        history = train_model(quantized, self, self, context, student=quantized.model)
        return StageResult(quantized, {**training_facts(history), **_told(quantized, context)})

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks the patterns, the target and the teacher."""
        _check(model, self)
        context.task.tuned(self)
        check_distillation(model, self, context)
        return model

    def facts(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().facts(), **DistillOptions.facts(self)}

    def training_epochs(self) -> float:
        """See the base class."""
        return float(self.epochs)


def _check(model: nn.Module, options: QuantizeOptions) -> None:
    """Patterns that match nothing, and what the target cannot express."""
    from slimkit.graph.patterns import match_modules
    from slimkit.quantize.planning.requests import check_request, granularity_of
    from slimkit.quantize.targets import resolve_target

    if options.skip:
        match_modules(model, options.skip, where="skip")
    bits = options.weight_bits
    named = bits if isinstance(bits, dict) else {} if bits is None else {"": bits}
    check_request(
        resolve_target(options.target),
        mode=options.mode,
        granularity=granularity_of(options.granularity, options.group_size),
        weight_bits=named,
    )


def _told(
    quantized: QuantizedModel, context: StageContext, *, original: nn.Module | None = None
) -> dict[str, Any]:
    """Facts for the report: warnings of the plan, and what rounding does to each layer."""
    from slimkit.quantize.outputs.layer_noise import layer_noise

    pictured = some_examples(context.splits.calibration, PICTURED_SAMPLES).inputs
    facts: dict[str, Any] = {
        "rounding": layer_noise(quantized, pictured.to(device_of(quantized)), original=original)
    }
    if quantized.plan.warnings:
        facts["warnings"] = list(quantized.plan.warnings)
        for text in quantized.plan.warnings:
            context.emit({"event": "warning", "message": text})
    return facts
