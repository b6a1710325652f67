"""The stage: one typed, cacheable step of a recipe, and the registry that recipes look it up in.

A stage is a frozen pydantic class. Its fields are what a recipe may set, its ``type`` is the
name it has there, and :meth:`Stage.run` does the work::

    @STAGES.register("noise")
    class Noise(Stage):
        type: Literal["noise"] = "noise"
        scale: float = 0.01

        def run(self, model, context):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(self.scale * torch.randn_like(parameter))
            return StageResult(model)

A recipe reaches a stage that is not registered as ``type: package.module:Noise``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from slimkit.errors import SlimkitError
from slimkit.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from slimkit.inputs import ExampleInputs, Inputs
    from slimkit.tasks.interface import Task
    from slimkit.tasks.splits import Splits

__all__ = [
    "ORIGINAL",
    "SELF",
    "STAGES",
    "UNPRUNED",
    "Stage",
    "StageContext",
    "StageResult",
    "ignore_event",
]

UNPRUNED = "unpruned"
"""The teacher that a chain has by itself: what its first ``prune`` or ``sparsify`` begins with."""

ORIGINAL = "original"
"""Another: what its first stage that compresses (prunes, sparsifies, quantizes) begins with."""

SELF = "self"
"""The student as its own teacher: its deeper layers teach the others."""


def ignore_event(event: Mapping[str, Any]) -> None:
    """A listener that does not listen."""


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind: one network, or several by name.

    Attributes:
        model: the network to hand on; its weights and the plans applied to it are cached.
        extra: JSON-able facts for the report, such as ``history`` or ``channels``. Of a stage that
            leaves several networks ``extra["models"][NAME]`` are the facts of one of them.
        models: in place of ``model``: name → network, for exactly the names of
            :meth:`Stage.parts`. A chain names one of them ``STAGE.NAME``.

    Raises:
        SlimkitError: there are both or none.
    """

    model: nn.Module | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.model is None) == (not self.models):
            given = "neither" if self.model is None else "both"
            raise SlimkitError(f"a StageResult has a model, or models by name; here are {given}")


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides the model.

    Attributes:
        name: the stage's name in the recipe.
        splits: the data; a stage must not touch ``splits.test``, which only the report reads.
        task: loss, metric, and all else that depends on the kind of task.
        seed: seeds everything random in the stage; torch, NumPy and Python are seeded with it.
        example_inputs: a call of the model with one sample.
        teacher: the network named by the stage's ``teacher``, in evaluation mode; the first
            of several.
        teachers: all of them, by name.
        work: a folder that survives a killed run; the next run gets the same one.
        log_dir: where TensorBoard scalars go, or None.
        max_steps: stop training after so many steps (``--smoke``), or None.
        progress: whether to show progress bars.
        emit: reports an event (a JSON-able mapping) to the log.
    """

    name: str
    splits: Splits
    task: Task
    seed: int
    example_inputs: ExampleInputs
    teacher: nn.Module | None = None
    teachers: Mapping[str, nn.Module] = field(default_factory=dict)
    work: Path | None = None
    log_dir: Path | None = None
    max_steps: int | None = None
    progress: bool = False
    emit: Callable[[Mapping[str, Any]], None] = ignore_event

    def examples(self, count: int) -> Inputs:
        """A call of the model with ``count`` samples."""
        return self.task.example_inputs(self.splits, count)


class Stage(BaseModel):
    """Base of all stages. ``type`` is a ``Literal`` with a default in every subclass.

    Raise :attr:`version` when the same settings come to give another result, so that results
    cached by the earlier version are not used again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: ClassVar[int] = 1
    sees_eval_batches: ClassVar[bool] = True
    """Whether the result may depend on ``data.eval_batch_size``, as calibration does."""
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Groups of settings of which a stage has one: setting one by ``--set`` replaces another."""

    type: str

    @abstractmethod
    def run(self, model: nn.Module, context: StageContext) -> StageResult:
        """Do the work on ``model`` (which may be changed) and return what comes out."""

    def preview(
        self, model: nn.Module, context: StageContext
    ) -> nn.Module | Mapping[str, nn.Module]:
        """The structure that :meth:`run` would leave, on untrained weights and in seconds.

        Of a stage with :meth:`parts`: name → structure, or one for all of them.
        Used by ``--dry-run``, and before a run so that a mistake shows before hours of training.
        """
        return model

    def parts(self) -> tuple[str, ...]:
        """Names of the networks that :meth:`run` leaves, if it leaves several.

        A search leaves a front, for instance; a chain goes on with one of them: ``search.small``.
        They follow from the settings alone, so that chains are checked before anything runs.
        """
        return ()

    def default_part(self) -> str | None:
        """Which of :meth:`parts` a chain means that names the stage alone; None: it has to say."""
        return None

    def teacher_name(self) -> str | None:
        """The teacher or stage that this stage learns from, if any."""
        return None

    def teacher_names(self) -> dict[str, str]:
        """All of them: name → its path below the stage, for errors."""
        name = self.teacher_name()
        return {} if name is None else {name: "teacher"}

    def facts(self) -> Mapping[str, Any]:
        """Facts beside the settings that a result depends on, for its cache key.

        JSON-able values, or dataclasses of such.
        """
        return {}

    def training_epochs(self) -> float:
        """Epochs of training, for the estimate of time; 0 for a stage that does not train."""
        return 0.0


STAGES: Registry[type[Stage]] = Registry("stage type")
"""Stage types by name."""

STAGES.register_lazy("train", "slimkit.recipe.stages.training:TrainStage")
STAGES.register_lazy("prune", "slimkit.recipe.stages.pruning:PruneStage")
STAGES.register_lazy("sparsify", "slimkit.recipe.stages.sparsification:SparsifyStage")
STAGES.register_lazy("ptq", "slimkit.recipe.stages.quantization:PtqStage")
STAGES.register_lazy("qat", "slimkit.recipe.stages.quantization:QatStage")
