"""``type: ptq`` and ``type: qat``: integers by calibration alone, or with training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from slimkit.recipe.fields import OneOf
from slimkit.recipe.methods import Method, build_method
from slimkit.recipe.stages import Stage, StageContext, StageResult
from slimkit.recipe.training_stage import DistillOptions, distilling, train_model, training_facts
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PtqStage", "QatStage", "QuantizeOptions"]


METHOD = Method("slimkit.quantize:METHODS")
Bits = Annotated[int, Field(ge=2, le=8)]


class QuantizeOptions(BaseModel):
    """How a network is quantized.

    Attributes:
        target: the runtime whose integer operators the scheme must fit.
        mode: scales of activations from calibration (static), from each batch (dynamic), or
            integer weights only (weights).
        granularity: weight scales per output channel, one per tensor, or one per group of inputs.
        group_size: inputs of a group; 32 by default.
        observer: how ranges of activations are taken from calibration batches.
        skip: patterns of layers that stay in float.
        batches: calibration batches, taken from the training split without augmentation.
        weight_bits: of all weights, or module pattern → bits; the target's by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Annotated[str, OneOf("slimkit.quantize:TARGETS")] = "onnxruntime"
    mode: Literal["static", "dynamic", "weights"] = "static"
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group_size: Annotated[int, Field(ge=1)] | None = None
    observer: Annotated[str, OneOf("slimkit.quantize:OBSERVERS")] = "minmax"
    skip: tuple[str, ...] = ()
    batches: int = Field(default=8, ge=1)
    weight_bits: Bits | dict[str, Bits] | None = None

    def arguments(self, context: StageContext) -> dict[str, Any]:
        """Keyword arguments for :func:`slimkit.quantize.ptq` and ``qat``."""
        return {
            "calibration": CalibrationBatches(context, self.batches),
            "target": self.target,
            "mode": self.mode,
            "granularity": self.granularity,
            "group_size": self.group_size,
            "observer": self.observer,
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

    version: ClassVar[int] = 1
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
        """See the base class. Checks the ``skip`` patterns and what the target can do."""
        _check(model, self)
        return model


class QatStage(QuantizeOptions, DistillOptions, TrainSettings, Stage):
    """Quantization-aware training, started from calibrated scales.

    All settings of :class:`slimkit.train.TrainSettings` are fields of the stage, and a teacher
    can be named as in ``type: train``. Four have defaults of their own: batch norms are folded,
    so weights are larger and nothing rescales gradients (``lr``, ``clip_grad_norm``), scales
    need the digits of float32 (``precision``), and little is left to learn (``epochs``).
    """

    version: ClassVar[int] = 1
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
        """See the base class. Checks the patterns, the target and the teacher."""
        _check(model, self)
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


def _check(model: nn.Module, options: QuantizeOptions) -> None:
    """Patterns that match nothing, and what the target cannot express."""
    from slimkit.graph.patterns import match_modules
    from slimkit.quantize.requests import check_request
    from slimkit.quantize.targets import resolve_target

    if options.skip:
        match_modules(model, options.skip, where="skip")
    bits = options.weight_bits
    named = bits if isinstance(bits, dict) else {} if bits is None else {"": bits}
    check_request(
        resolve_target(options.target),
        mode=options.mode,
        granularity=options.granularity,
        group_size=options.group_size,
        weight_bits=named,
    )
