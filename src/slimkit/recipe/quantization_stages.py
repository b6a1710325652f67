"""``type: ptq`` and ``type: qat``: int8 by calibration alone, or with training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimkit.errors import InputError
from slimkit.recipe.fields import OneOf, wrong
from slimkit.recipe.methods import Method, build_method
from slimkit.recipe.stages import Stage, StageContext, StageResult
from slimkit.recipe.training_stage import DistillOptions, distilling, train_model, training_facts
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PtqStage", "QatStage", "QuantizeOptions"]

OBSERVER = Method("slimkit.quantize:OBSERVERS")


METHOD = Method("slimkit.quantize:METHODS")
Bits = Annotated[int, Field(ge=2, le=8)]


class QuantizeOptions(BaseModel):
    """How a network is quantized.

    Attributes:
        target: the runtime whose integer operators the scheme must fit.
        granularity: weight scales per output channel, or one per tensor.
        observer: how ranges of activations are taken from calibration batches; a name, or a
            mapping with its settings.
        skip: patterns of layers that stay in float.
        batches: calibration batches, taken from the training split without augmentation.
        weight_bits: of all weights, or module pattern → bits; the target's by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Annotated[str, OneOf("slimkit.quantize:TARGETS")] = "onnxruntime"
    granularity: Literal["channel", "tensor"] = "channel"
    observer: Annotated[str | BaseModel, OBSERVER] = "minmax"
    skip: tuple[str, ...] = ()
    batches: int = Field(default=8, ge=1)
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
        return {
            "calibration": CalibrationBatches(context, self.batches),
            "target": self.target,
            "granularity": self.granularity,
            "observer": self.chosen_observer(),
            "skip": self.skip,
            "weight_bits": self.weight_bits,
        }

    def facts(self) -> dict[str, Any]:
        """See :meth:`slimkit.recipe.stages.Stage.facts`: some targets follow the processor."""
        from slimkit.quantize.targets import resolve_target

        sums = resolve_target(self.target).sums
        return {} if sums == "int32" else {"sums": sums}


class CalibrationBatches:
    """The first ``count`` batches of training images, as the quantizer wants to be shown them.

    Attributes:
        role: the split it reads, which the quantizer checks.
    """

    def __init__(self, context: StageContext, count: int) -> None:
        self.loader = context.splits.calibration
        self.count = 1 if context.max_steps is not None else count
        self.role = self.loader.role

    def __iter__(self) -> Iterator[Tensor]:
        for number, (images, _) in enumerate(self.loader):
            if number == self.count:
                return
            yield images


class PtqStage(QuantizeOptions, Stage):
    """Post-training quantization: calibrated on training images, no training.

    Attributes:
        methods: what else to do beside calibration, in this order.
    """

    version: ClassVar[int] = 2
    type: Literal["ptq"] = "ptq"
    methods: tuple[Annotated[Any, METHOD], ...] = ()

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.quantize import ptq

        quantized = ptq(
            model.eval(),
            context.example_inputs,
            methods=[build_method(METHOD, choice, {}) for choice in self.methods],
            progress=context.progress,
            **self.arguments(context),
        )
        return StageResult(quantized)

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks the ``skip`` patterns."""
        _check_skip(model, self.skip)
        return model


class QatStage(QuantizeOptions, DistillOptions, TrainSettings, Stage):
    """Quantization-aware training, started from calibrated scales.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage, and a teacher
    can be named as in ``type: train``. Four have defaults of their own: batch norms are folded,
    so weights are larger and nothing rescales gradients (``lr``, ``clip_grad_norm``), scales
    need the digits of float32 (``precision``), and little is left to learn (``epochs``).
    """

    version: ClassVar[int] = 2
    type: Literal["qat"] = "qat"
    epochs: Annotated[float, Field(gt=0)] = 2
    lr: Annotated[float, Field(gt=0)] = 5e-4
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        from slimkit.quantize import qat

        quantized = qat(model.eval(), context.example_inputs, **self.arguments(context))
        history = train_model(quantized, self, self, context, student=quantized.model)
        return StageResult(quantized, training_facts(history))

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class. Checks the ``skip`` patterns and the teacher."""
        _check_skip(model, self.skip)
        if context.teacher is not None:
            with distilling(model, self, context):
                pass
        return model

    def teacher_name(self) -> str | None:
        """See the base class."""
        return self.teacher

    def training_epochs(self) -> float:
        """See the base class."""
        return float(self.epochs)


def _check_skip(model: nn.Module, skip: tuple[str, ...]) -> None:
    from slimkit.graph.patterns import match_modules

    if skip:
        match_modules(model, skip, where="skip")
