"""``type: prune``: remove channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from slimkit.errors import DataError, InputError, PlanError
from slimkit.inputs import Batch, LossOfBatch
from slimkit.recipe.schema.fields import MOST_THREADS, OneOf, wrong
from slimkit.recipe.schema.methods import MethodField, build_method
from slimkit.recipe.stages.interface import Stage, StageContext, StageResult
from slimkit.recipe.stages.teachers import DistillOptions
from slimkit.recipe.stages.training import train_model
from slimkit.tasks.running import mean_loss
from slimkit.tasks.splits import first_batches
from slimkit.train.settings import TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from slimkit.modules import Evaluate
    from slimkit.prune import PrunePlan
    from slimkit.tasks.splits import Loader

__all__ = ["PruneStage", "TrainingBatches"]

Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Channels = Annotated[int, Field(ge=1, le=1_000_000)]

REMOVALS = ("ratio", "macs", "params", "latency")
ROUND_TO: Mapping[str | None, int] = {None: 8, "int8": 16}
"""What follows → multiple of channels that wastes none. Measured in ONNX Runtime 1.32 on an x86
processor with VNNI and AMX, one thread: ResNet-56 with half of the MACs takes in int8 0.413 ms
with multiples of 16 and 0.567 ms with multiples of 8, and 0.534 ms unpruned."""
CRITERION = MethodField(
    "slimkit.prune:CRITERIA",
    {
        "taylor": "slimkit.prune.criteria.gradients:Taylor",
        "obd": "slimkit.prune.criteria.gradients:OBD",
        "group_fisher": "slimkit.prune.criteria.fisher:GroupFisher",
    },
    given=("batches", "loss", "max_batches"),
)
ALLOCATION = MethodField("slimkit.prune:ALLOCATIONS", given=("file", "storage", "seed", "recover"))
_QUICK: dict[str, Any] = {"trials": 2, "ratios": (0.5,)}  # of a smoke run


class PruneStage(Stage):
    """Structured pruning: whole channels leave, the tensors get smaller.

    Exactly one of ``ratio``, ``macs``, ``params`` and ``latency`` is the target; each is a
    fraction REMOVED.

    Attributes:
        ratio: fraction of the channels of every prunable group.
        macs: at least this fraction of the multiply-accumulates.
        params: at least this fraction of the parameters.
        latency: at least this fraction of the milliseconds, measured on pruned copies.
        backend: where latency is measured, for one example.
        threads: that it may use.
        criterion: which channels matter least; a name, or a mapping with its settings.
        normalisation: what the scores of a group are divided by before groups are compared.
        allocation: how the target is spread over the groups; a name, or a mapping with its
            settings.
        ratios: pattern of layers → fraction that they lose, in place of an allocation; with
            ``ratio`` as the target the other layers lose that, else all are scaled alike.
        ignore: patterns of layers that keep their channels.
        only: patterns of layers that alone may lose channels; empty for all.
        unused: patterns of modules and parameters that never run: what they could read need not
            stay whole.
        equal: lists of patterns; the layers of one list keep equal fractions.
        limits: pattern of layers → fewest and most channels that they keep; null for no limit.
        attention: whole ``heads``, or ``channels`` of every head; null for what the model's code
            allows best.
        then: what follows this stage: ``int8`` if the network will be quantized. Latency is then
            measured on quantized copies, whose scales are those of one example.
        round_to: kept channels are a multiple of this; 8, or 16 where ``then`` is ``int8``.
        min_channels: layers keep at least so many; ``round_to`` if not given.
        batches: training batches (of ``data.eval_batch_size``) that a criterion looks at which
            needs gradients.
        evaluate: what an allocation compares that tries pruned copies: the task's loss, or its
            metric.
        evaluation_batches: training batches that it is computed on, others than ``batches``.
        steps: prune in so many steps, with training ``between`` them.
        schedule: how far each step goes.
        between: training between two steps.
        batch_norm_reestimation: training batches for fresh batch-norm statistics; 0 for none.
            Candidates of an evolution get them, too.
    """

    version: ClassVar[int] = 2
    exclusive: ClassVar = (REMOVALS,)
    type: Literal["prune"] = "prune"
    ratio: Fraction | None = None
    macs: Fraction | None = None
    params: Fraction | None = None
    latency: Fraction | None = None
    backend: Annotated[str, OneOf("slimkit.runtime.sessions:BACKENDS")] = "onnxruntime"
    threads: int = Field(default=1, ge=1, le=MOST_THREADS)
    criterion: Annotated[str | BaseModel, CRITERION] = "l2"
    normalisation: Literal["none", "mean", "max", "sum", "std", "gaussian"] = "none"
    allocation: Annotated[str | BaseModel, ALLOCATION] = "uniform"
    ratios: dict[str, Part] = Field(default={})
    ignore: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    equal: tuple[tuple[str, ...], ...] = ()
    limits: dict[str, tuple[Channels | None, Channels | None]] = Field(default={})
    attention: Literal["heads", "channels"] | None = None
    then: Literal["int8"] | None = None
    round_to: int | None = Field(default=None, ge=1, le=65_536)
    min_channels: Channels | None = None
    batches: int = Field(default=16, ge=1, le=1_000_000)
    evaluate: Literal["loss", "metric"] = "loss"
    evaluation_batches: int = Field(default=8, ge=1, le=1_000_000)
    steps: int = Field(default=1, ge=1, le=1_000)
    schedule: Literal["cubic", "linear"] = "cubic"
    between: TrainSettings | None = None
    batch_norm_reestimation: int = Field(default=20, ge=0, le=1_000_000)

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        given = [name for name in REMOVALS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise wrong(
                f"expected exactly one of {', '.join(REMOVALS[:-1])} and {REMOVALS[-1]}, "
                f"got {found}",
                "macs: 0.5 removes half of the multiply-accumulates",
            )
        if self.ratios and self.allocation != "uniform":
            raise wrong(
                "ratios are an allocation of their own", "leave out allocation", path="ratios"
            )
        if (self.steps > 1) != (self.between is not None):
            where, other = ("between", "steps") if self.between else ("steps", "between")
            raise wrong(
                f"{where} needs {other}", "steps: 4, between: {epochs: 1, lr: 0.01}", path=where
            )
        return self

    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """See the base class."""
        history: list[dict[str, Any]] = []

        def between(network: nn.Module, step: int) -> None:
            """Training after a step; after the last one the next stages recover."""
            if self.between is None or step == self.steps - 1:
                return
            work = context.work / f"step{step + 1}" if context.work else None
            name = f"{context.name} {step + 1}/{self.steps}"
            inner = replace(context, name=name, work=work, teacher=None, teachers={}, log_dir=None)
            done = train_model(network, self.between, DistillOptions(), inner)
            history.extend({**row, "epoch": len(history)} for row in done.epochs)

        plans = self._pruned(model.eval(), context, between)
        self._reestimate(model, context)
        extra: dict[str, Any] = {"channels": _channels(plans)}
        if history:
            extra["history"] = history
        facts = plans[0].settings
        if "measured_ms" in facts and len(plans) == 1:
            keys = ("backend", "threads", "measured_ms")
            extra["measured"] = {key: facts[key] for key in keys}
        if facts.get("warnings"):
            extra["warnings"] = list(facts["warnings"])
            for text in facts["warnings"]:
                context.emit({"event": "warning", "message": text})
        return StageResult(model, extra)

    def preview(self, model: nn.Module, context: StageContext) -> nn.Module:
        """See the base class.

        Prunes by the magnitude of the untrained weights and evenly, if the stage looks at data;
        a latency is taken for a number of MACs. The sizes are right for uniform allocation and
        near for the others.
        """
        from slimkit import prune
        from slimkit.plan import apply

        arguments = {**self._arguments(context), "evaluate": None}
        if "batches" in _fields(self._criterion(context)):
            arguments["criterion"] = "l2"
        if self.latency is not None:
            arguments |= {"latency": None, "macs": self.latency}
        try:
            try:
                plan = prune.plan(model, context.example_inputs, **arguments)
            except InputError as error:
                if error.where != "evaluate":
                    raise
                arguments["allocation"] = "uniform"
                plan = prune.plan(model, context.example_inputs, **arguments)
        except PlanError as error:
            if self.latency is None or error.where != "macs":
                raise
            return model  # whether the milliseconds can be had only measuring will tell
        return apply(model, plan)

    def training_epochs(self) -> float:
        """See the base class."""
        return (self.steps - 1) * float(self.between.epochs) if self.between else 0.0

    def _pruned(self, model: nn.Module, context: StageContext, between: Any) -> list[PrunePlan]:
        """Prune ``model`` in place, in one step or several."""
        from slimkit import prune
        from slimkit.plan import apply

        arguments = self._arguments(context)
        if context.max_steps is not None and self.latency is not None:  # a smoke run is quick
            arguments |= {"latency": None, "macs": self.latency}
        if self.steps > 1:
            from slimkit.prune.iterative import iterate

            return iterate(
                model,
                context.example_inputs,
                train=between,
                steps=self.steps,
                schedule=self.schedule,
                **arguments,
            )
        plan = prune.plan(model, context.example_inputs, **arguments)
        plan = replace(plan, settings={**plan.settings, **self._told()})
        apply(model, plan)
        return [plan]

    def _told(self) -> dict[str, Any]:
        """Criterion and allocation in the words of the recipe."""
        dumped = self.model_dump(mode="json", include={"criterion", "allocation", "ratios"})
        ratios = dumped.pop("ratios")
        return {**dumped, "allocation": ratios} if ratios else dumped

    def _arguments(self, context: StageContext) -> dict[str, Any]:
        """Keyword arguments for :func:`slimkit.prune.plan`."""
        from slimkit.prune.criteria.scores import Normalised

        criterion = self._criterion(context)
        if self.normalisation != "none":
            criterion = Normalised(criterion, self.normalisation)
        return {
            **{name: getattr(self, name) for name in REMOVALS},
            "criterion": criterion,
            "allocation": self.ratios or self._allocation(context),
            "ignore": self.ignore,
            "only": self.only,
            "unused": self.unused,
            "equal": self.equal,
            "limits": self.limits,
            "attention": self.attention,
            "round_to": self.round_to or ROUND_TO[self.then],
            "min_channels": self.min_channels,
            "evaluate": self._evaluation(context),
            "backend": self.backend,
            "threads": self.threads,
            "deployed": _quantizer(context) if self.then == "int8" else None,
            "progress": context.progress,
        }

    def _criterion(self, context: StageContext) -> Any:
        """The criterion, with training batches and the task's loss if it looks at gradients."""
        quick = context.max_steps is not None
        skip, count = (1, 1) if quick else (self.evaluation_batches, self.batches)
        batches = TrainingBatches(context.splits.calibration, count, skip=skip)
        task = context.task
        given = {"batches": batches, "loss": task.loss_fn() or LossOfBatch(task.loss)}
        return build_method(CRITERION, self.criterion, given)

    def _allocation(self, context: StageContext) -> Any:
        """The allocation, with what it needs to be resumed and repeated."""

        def batch_norm(model: nn.Module) -> None:
            self._reestimate(model, context)

        given: dict[str, Any] = {"seed": context.seed}
        if context.work is not None:
            given["file"] = context.work / "sensitivity.json"
            given["storage"] = context.work / "trials.journal"
        if self.batch_norm_reestimation:
            given["recover"] = batch_norm
        allocation = build_method(ALLOCATION, self.allocation, given)
        quick = {} if context.max_steps is None else _QUICK
        quick = {name: value for name, value in quick.items() if name in _fields(allocation)}
        return replace(allocation, **quick) if quick else allocation

    def _evaluation(self, context: StageContext) -> Evaluate:
        """How good a network is on the first training batches, in evaluation mode."""
        count = self.evaluation_batches if context.max_steps is None else 1
        batches = TrainingBatches(context.splits.calibration, count)
        task = context.task
        held: list[Batch] = []

        def evaluate(model: nn.Module) -> float:
            if not held:
                held.extend(batches)
            if self.evaluate == "metric":
                return task.metric.goodness(task.evaluate(model, held)[task.metric.name])
            return -mean_loss(task, model, held)

        return evaluate

    def _reestimate(self, model: nn.Module, context: StageContext) -> None:
        from slimkit.train import reestimate_batch_norm

        count = self.batch_norm_reestimation
        if not count:
            return
        count = count if context.max_steps is None else min(count, context.max_steps)
        context.splits.train.set_epoch(0)
        reestimate_batch_norm(model, first_batches(context.splits.train, count))


class TrainingBatches:
    """Some batches of training samples, not augmented, always the same; can be read repeatedly.

    Attributes:
        role: the split that they are from.

    Args:
        loader: of training samples.
        count: at most so many batches.
        skip: so many before them, if there are enough for both.

    Raises:
        DataError: the loader is of another split: what is chosen by validation or test samples
            cannot be judged by them.
    """

    def __init__(self, loader: Loader, count: int, *, skip: int = 0) -> None:
        if loader.role != "train":
            raise DataError(
                f"pruning must not see the {loader.role} split",
                where="data",
                hint="it is decided on training samples",
            )
        self.role = loader.role
        self._loader = loader
        self._first = skip if len(loader) > skip else 0
        self._count = count

    def __iter__(self) -> Iterator[Batch]:
        batches = first_batches(self._loader, self._first + self._count)
        return itertools.islice(batches, self._first, None)


def _quantizer(context: StageContext) -> Callable[[nn.Module], nn.Module]:
    """Network → a copy in int8 by the example inputs alone: as fast as one that is calibrated."""

    def quantized(model: nn.Module) -> nn.Module:
        from slimkit.inputs import as_inputs
        from slimkit.quantize.calibration import attach, calibrate

        example = as_inputs(context.example_inputs)
        wrapped = attach(
            model,
            example,
            target="onnxruntime",
            granularity="channel",
            observer="minmax",
            skip=(),
        )
        calibrate(wrapped, [example], observer="minmax")
        return wrapped.eval()

    return quantized


def _fields(method: Any) -> set[str]:
    """The names of a method's settings."""
    return set(getattr(method, "__dataclass_fields__", ()))


def _channels(plans: list[PrunePlan]) -> list[dict[str, Any]]:
    """Layer by layer what is kept in the end of what there was at first."""
    return [
        {"layer": layer, "kept": plans[-1].kept[layer][0], "total": total}
        for layer, (_, total) in plans[0].kept.items()
    ]
