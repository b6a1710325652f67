"""The typed recipe: every key that a YAML file may have, its type, range and default."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from slimkit.recipe.schema.fields import MOST_THREADS, OneOf, SettingsOf, TypedBy, wrong
from slimkit.recipe.schema.links import LINK, full_link, link_problem, parts_problem
from slimkit.recipe.stages.interface import ORIGINAL, UNPRUNED, Stage
from slimkit.tasks import ClassificationTask
from slimkit.tasks.interface import Task

__all__ = [
    "BackendSettings",
    "MeasureSettings",
    "ModelSettings",
    "Recipe",
    "RequireSettings",
    "TeacherSettings",
    "recipe_schema",
]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
"""Of stages, teachers and variants: part of paths and folder names, so no dots or slashes."""

StageLink = Annotated[str, WithJsonSchema({"type": "string", "pattern": LINK})]
"""A stage's name, or STAGE.PART for one of several networks that it leaves."""

Ratio = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Settings):
    """A network and its weights.

    Attributes:
        name: ``slimkit:resnet20``, ``torchvision:…``, ``timm:…`` or ``package.module:factory``.
        args: keyword arguments of the factory.
        checkpoint: a safetensors file beside the recipe, in the current folder or under
            ``$SLIMKIT_CHECKPOINTS``; None starts from what the factory returns.
    """

    name: str
    args: dict[str, Any] = {}
    checkpoint: str | None = None


class TeacherSettings(ModelSettings):
    """A trained network to learn from."""


class BackendSettings(Settings):
    """One way of measuring latency.

    Attributes:
        name: a runtime, see ``slimkit list backends``.
        threads: threads inside one inference.
        batch: images per inference.
    """

    name: Annotated[str, OneOf("slimkit.runtime.sessions:BACKENDS")] = "onnxruntime"
    threads: int = Field(default=1, ge=1, le=MOST_THREADS)
    batch: int = Field(default=1, ge=1, le=65_536)


class MeasureSettings(Settings):
    """What is measured of every variant.

    Attributes:
        backends: latency is measured on each; the first also evaluates the accuracy and is
            the one that ``latency_ratio`` compares.
        seconds: time per variant and backend.
        parity_batches: test batches that torch and runtime are compared on.
        memory: measure what each file takes while it runs; a few seconds, once per file.
    """

    backends: Annotated[tuple[BackendSettings, ...], Field(min_length=1)] = (BackendSettings(),)
    seconds: float = Field(default=2.0, gt=0, le=3_600)
    parity_batches: int = Field(default=4, ge=1, le=1_000_000)
    memory: bool = True


class RequireSettings(Settings):
    """Gates on the last variant against the first; a missed one ends the run with exit code 1.

    Attributes:
        metric_drop: the metric that decides may be worse than the baseline's by at most so much.
        min_metric: it must be at least as good as this: not below, or for one of which less is
            better not above.
        accuracy_drop: at most so many points below the baseline, of a task with an accuracy.
        min_accuracy: at least this accuracy, in percent.
        bytes_ratio: size of the deployed file, relative to the baseline, at most.
        latency_ratio: median latency on the first backend, relative, at most.
        params_ratio, macs_ratio: relative, at most.
        sqnr_db: signal-to-noise ratio of the runtime's outputs against torch's, at least.
        top1_agreement: fraction of images with the same class in torch and runtime, at least.
        max_abs_diff: of the outputs of torch and runtime, at most (for float variants).
        integer_convs: fraction of convolutions that the runtime runs as integer, at least.
    """

    metric_drop: float | None = Field(default=None, ge=-1e6, le=1e6)
    min_metric: float | None = Field(default=None, ge=-1e6, le=1e6)
    accuracy_drop: float | None = Field(default=None, ge=-1e6, le=1e6)
    min_accuracy: float | None = Field(default=None, ge=0, le=100)
    bytes_ratio: Ratio | None = None
    latency_ratio: Ratio | None = None
    params_ratio: Ratio | None = None
    macs_ratio: Ratio | None = None
    sqnr_db: float | None = Field(default=None, ge=-1e6, le=1e6)
    top1_agreement: Fraction | None = None
    max_abs_diff: Ratio | None = None
    integer_convs: Fraction | None = None


_TASK = TypedBy("slimkit.tasks.interface:TASKS", by_name=True)
_DATA = SettingsOf("task", "data_settings", _TASK, default="classification")


class Recipe(Settings):
    """One experiment: data, a network, stages, and the chains of them that are compared.

    Attributes:
        name: of the experiment; the default output folder is ``runs/NAME``.
        seed: of initial weights, order of images, and everything else that is random.
        task: what the network does: a name, or a mapping with the task's settings.
        data: where samples come from, in the words of the task.
        model: the network that every variant starts from.
        teachers: trained networks that stages can name as their ``teacher``.
        stages: stage name → typed settings.
        variants: variant name → chain of stage names, or STAGE.PART where a stage leaves several
            networks. The first is the baseline, the last the final one; common beginnings run
            once. An empty chain is the model as it is.
        measure: what is measured.
        require: gates.
        threads: of PyTorch, for all that is trained and evaluated with it; None leaves them as they
            are. What comes out does not depend on it, but for rounding.
        needs: what must be there before it can run (a data set, a checkpoint) → where that comes
            from; told when something is missing.
        takes: how long it takes, and on what; told with it.
    """

    name: Name
    seed: int = Field(default=0, ge=0, lt=2**31)
    task: Annotated[Task, _TASK] = ClassificationTask()
    data: Annotated[BaseModel, _DATA]
    model: ModelSettings
    teachers: dict[Name, TeacherSettings] = {}
    stages: dict[Name, Annotated[Stage, TypedBy("slimkit.recipe.stages.interface:STAGES")]] = {}
    variants: Annotated[dict[Name, tuple[StageLink, ...]], Field(min_length=1)]
    measure: MeasureSettings = MeasureSettings()
    require: RequireSettings = RequireSettings()
    threads: int | None = Field(default=None, ge=1, le=MOST_THREADS)
    needs: dict[str, str] = {}
    takes: str | None = None

    @field_validator("variants")
    @classmethod
    def _default_parts_are_written_out(
        cls, variants: dict[str, tuple[str, ...]], info: ValidationInfo
    ) -> dict[str, tuple[str, ...]]:
        stages = info.data.get("stages", {})
        return {
            name: tuple(full_link(link, stages) for link in chain)
            for name, chain in variants.items()
        }

    @model_validator(mode="after")
    def _parts_have_names(self) -> Self:
        for name, stage in self.stages.items():
            if problem := parts_problem(stage):
                raise wrong(problem, path=f"stages.{name}")
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for variant, chain in self.variants.items():
            for number, stage in enumerate(chain):
                if problem := link_problem(stage, self.stages):
                    raise wrong(*problem, path=f"variants.{variant}.{number}")
        self._gates_fit_the_task()
        for name in self.teachers:
            if name in self.stages:
                raise wrong("a stage has the same name", "rename one", path=f"teachers.{name}")
        for name, stage_settings in self.stages.items():
            others = [*self.teachers, UNPRUNED, ORIGINAL]
            for teacher, place in stage_settings.teacher_names().items():
                problem = link_problem(teacher, self.stages, others=others)
                if teacher not in others and problem is not None:
                    raise wrong(*problem, path=f"stages.{name}.{place}")
        return self

    def _gates_fit_the_task(self) -> None:
        """Limits on the accuracy need one, and a limit lies where the metric can be."""
        names = {metric.name for metric in self.task.metrics}
        for gate, other in (("accuracy_drop", "metric_drop"), ("min_accuracy", "min_metric")):
            if getattr(self.require, gate) is not None and "accuracy" not in names:
                message = f"the task {self.task.type} has no accuracy"
                raise wrong(message, f"did you mean {other!r}?", path=f"require.{gate}")
        metric, limit = self.task.metric, self.require.min_metric
        if limit is not None and not metric.holds(limit):
            ends = ["any" if end is None else f"{end:g}" for end in (metric.low, metric.high)]
            message = f"{metric.label} is within {' … '.join(ends)}, got {limit:g}"
            raise wrong(message, path="require.min_metric")


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of recipes, for editors and validators.

    Tasks, stages and distillation losses are the registered ones; a class of one's own is
    accepted by its ``package.module:Class``. What ``data`` may say depends on the task.
    """
    schema = Recipe.model_json_schema()
    of_tasks = _DATA.conditions()
    references, defined = models_json_schema(
        [(settings, "validation") for _, settings in of_tasks], ref_template="#/$defs/{model}"
    )
    conditions = []
    for name, settings in of_tasks:
        named = {"properties": {"type": {"const": name}}, "required": ["type"], "type": "object"}
        condition: dict[str, Any] = {"properties": {"task": {"anyOf": [{"const": name}, named]}}}
        if name != _DATA.default:
            condition["required"] = ["task"]
        shape = references[settings, "validation"]
        conditions.append({"if": condition, "then": {"properties": {"data": shape}}})
    schema["$defs"] = {**schema.get("$defs", {}), **defined.get("$defs", {})}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "allOf": conditions,
    }
