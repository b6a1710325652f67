"""The task: what a network is trained, judged and deployed for; and the registry of tasks.

A task is a frozen pydantic class, as a stage is. Its fields are what a recipe may say under
``task:``, its ``type`` is the name it has there. Recipes, stages, proofs and reports know what
is declared here and nothing else of detection, segmentation or text::

    @TASKS.register("regression")
    class Regression(Task):
        type: Literal["regression"] = "regression"
        data_settings: ClassVar = MySettings
        metrics: ClassVar = (Metric("rmse", "RMSE", unit="", higher_is_better=False, high=None),)

        def load(self, settings): ...
        def synthetic(self, settings, model, *, batches): ...
        def loss(self, model, batch): ...
        def scores(self, answers): ...

These five are what every task must say; the rest has an answer that fits a model which takes a
batch and returns one tensor. :func:`slimkit.tasks.conformance.check_task` runs all of them.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import InputError, ModelError
from slimkit.inputs import Batch, Inputs
from slimkit.registry import Registry
from slimkit.tasks.evidence import Evidence, Examination
from slimkit.tasks.prediction import model_metadata, script_of
from slimkit.tasks.running import Run, device_of, module_run, only_output
from slimkit.tasks.splits import Splits, first_batches, some_examples

if TYPE_CHECKING:
    from slimkit.tasks.drawing import Drawing
    from slimkit.train.settings import TrainSettings

__all__ = ["TASKS", "Answer", "Metric", "SettingsClass", "Task", "answers_to"]

SettingsClass = type[BaseModel]  # a task's field "type" hides the builtin in its annotations

Answer = tuple[Any, Batch]
"""What a model, or a file, says to a batch; both on the same device."""


@door
@dataclass(frozen=True)
class Metric:
    """A figure that says how good a network is.

    Attributes:
        name: in ``report.json``, such as ``map``.
        label: as it is written, such as ``mAP``.
        unit: behind the number; ``"%"``, whose differences are points, or nothing.
        higher_is_better: False for errors, losses and distances.
        low, high: the interval that it can be in; None where it is open.
    """

    name: str
    label: str
    unit: str = "%"
    higher_is_better: bool = True
    low: float | None = 0.0
    high: float | None = 100.0

    @property
    def digits(self) -> int:
        """Digits behind the point: two, or four for what lies between 0 and 1."""
        return 4 if self.high is not None and self.high <= 1 else 2

    def goodness(self, value: float) -> float:
        """The value, or its negative where less is better: more of it is always better."""
        return value if self.higher_is_better else -value

    def holds(self, value: float) -> bool:
        """Whether a value is inside the interval."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def written(self, scores: Mapping[str, float]) -> str:
        """``mAP 31.45 %``, from all scores of a network."""
        if self.name not in scores:
            return f"{self.label} not measured"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.label} {scores[self.name]:.{self.digits}f}{unit}"

    def to_json(self) -> dict[str, Any]:
        """All attributes, and the digits."""
        return {**asdict(self), "digits": self.digits}


@door
class Task(BaseModel):
    """Base of all tasks. ``type`` is a ``Literal`` with a default in every subclass.

    Attributes:
        data_settings: what the ``data:`` section of a recipe is read as; with ``source`` and
            ``eval_batch_size`` the command line can use the task, too.
        metrics: the first one decides: gates, limits of quantization, the head of the report.
        version: raise it when the same settings come to give another result.
        script: module that is written beside a file as ``predict.py`` and that ``slimkit predict``
            runs: imports nothing of Slimkit, has ``main(arguments, model)``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    data_settings: ClassVar[SettingsClass]
    metrics: ClassVar[tuple[Metric, ...]]
    version: ClassVar[int] = 1
    script: ClassVar[str] = "slimkit.tasks.predict_arrays"

    type: str

    @property
    def metric(self) -> Metric:
        """The one that decides."""
        return self.metrics[0]

    # ---- data

    @abstractmethod
    def load(self, settings: Any) -> Splits:
        """Read the data.

        Args:
            settings: of the class :attr:`data_settings`.

        Raises:
            DataError: missing, empty or damaged data.
        """

    @abstractmethod
    def synthetic(self, settings: Any, model: nn.Module, *, batches: int) -> Splits:
        """Made-up data in the form that ``settings`` describe, for ``--smoke``; reads no file.

        Args:
            settings: as in :meth:`load`; batches of more than a few samples make it slow.
            model: the recipe's network on untrained weights, to see how many classes it has.
            batches: of training.
        """

    def locate(self, settings: Any) -> None:
        """Look whether the data are there, in no time, before anything is read.

        Args:
            settings: as in :meth:`load`, which finds whatever is not found here.

        Raises:
            DataError: a folder that they name is missing.
        """

    def takes_source(self, source: str) -> bool:
        """Whether ``--data SOURCE`` on the command line is of this task."""
        return False

    def example_inputs(self, splits: Splits, count: int = 1) -> Inputs:
        """A call of the model with ``count`` samples (or a batch, if they cannot be told apart).

        The default takes calibration samples; a task whose shapes say everything makes zeros.
        """
        return some_examples(splits.calibration, count).inputs

    def model_arguments(self, splits: Splits) -> Mapping[str, Any]:
        """Arguments of a model's factory that the data decide; used where it has them."""
        return {"num_classes": len(splits.classes)} if splits.classes else {}

    def check_head(self, model: nn.Module, splits: Splits) -> None:
        """Make sure that ``model`` fits the data; the default runs it on two samples.

        Raises:
            ModelError: it fails on them, or its outputs do not fit the classes.
        """
        self.probed(model, splits)

    def probed(self, model: nn.Module, splits: Splits) -> Any:
        """What ``model`` returns for two samples.

        Raises:
            ModelError: it cannot take them.
        """
        inputs = self.example_inputs(splits, 2)
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs.tensors())
        try:
            with module_run(model) as run:
                return run(inputs)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
            raise ModelError(
                f"the model cannot take inputs of shape {shapes}: {error}", where="model"
            ) from error

    # ---- training

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        """What training minimises, the mean over the samples; and the model's outputs.

        ``model`` is to be called (it may be wrapped), in training or in evaluation mode; where
        its loss exists in training mode only, see :func:`slimkit.tasks.running.in_training`.
        """

    def loss_fn(self) -> Callable[[Any, Any], Tensor] | None:
        """The loss of (outputs, targets), for networks that learn from each other; None: inside."""
        return None

    def tuned(self, settings: TrainSettings) -> Task:
        """This task with what a training stage says of its loss.

        Raises:
            InputError: the task's loss has no such thing.
        """
        if settings.label_smoothing:
            raise InputError(
                f"the loss of {self.type} has no label smoothing", where="label_smoothing"
            )
        return self

    def teacher_inputs(self, batch: Batch) -> Inputs:
        """What a teacher is called with, in evaluation mode; targets stay with the student."""
        return batch.inputs

    def distillation(self, model: nn.Module) -> Sequence[Mapping[str, Any]]:
        """Losses by which ``model``'s own original teaches it, in the words of a recipe.

        What ``teacher: original`` stands for; the default has none.
        """
        return ()

    # ---- evaluation

    @abstractmethod
    def scores(self, answers: Iterable[Answer]) -> Mapping[str, float]:
        """All metrics over a split; ``loss`` too where outputs and targets tell it.

        Args:
            answers: outputs of a module or (after :meth:`complete`) of a file, and their batch;
                one after the other, so that none need be held.
        """

    def running(self, model: nn.Module) -> AbstractContextManager[Run]:
        """``model`` in evaluation mode as a function from inputs to answers; flags restored.

        The default gives what the model returns. A task that needs the model to read its outputs
        (a detector's boxes are decoded by the detector) does it here, and in :meth:`complete`
        for files.
        """
        return module_run(model)

    def evaluate(self, model: nn.Module | Run, loader: Iterable[Any]) -> dict[str, float]:
        """:meth:`scores` of a module, or of any function from :class:`Inputs` to outputs.

        A module is run in evaluation mode without gradients, its flags restored.

        Raises:
            InputError: the loader yields no batch.
        """
        if isinstance(model, nn.Module):
            with self.running(model) as run:
                return dict(self.scores(answers_to(run, loader, device_of(model))))
        return dict(self.scores(answers_to(model, loader)))

    def examine(self, answers: Iterable[Answer], splits: Splits) -> Examination:
        """:meth:`scores` of a test split, and what a report needs of the single answers.

        Args:
            answers: as for :meth:`scores`; read them once.
            splits: the data.
        """
        return Examination(self.scores(answers))

    def evidence(self, records: Mapping[str, Any], splits: Splits) -> Evidence:
        """How sure the scores are and what changed; see :mod:`slimkit.tasks.evidence`.

        Args:
            records: name of a variant → what :meth:`examine` kept of it, after JSON; all
                variants on the same samples in the same order.
            splits: the data.
        """
        return Evidence()

    def predictions(self, outputs: Any, splits: Splits) -> list[Any]:
        """Post-processing: what the outputs mean, one JSON-able value per sample."""
        return []

    def drawings(
        self,
        answers: Mapping[str, Iterable[Answer]],
        splits: Splits,
    ) -> Sequence[Drawing]:
        """What the report shows beside the figures; see :mod:`slimkit.tasks.drawing`.

        Args:
            answers: name of the first and of the last variant → its file's answers on the test
                split. They are computed while they are read: take as few as you need.
            splits: the data.
        """
        return ()

    # ---- deployment

    def exported(self, model: nn.Module, splits: Splits) -> nn.Module:
        """The module that is written into a file: ``model``, or a part or wrapper of it.

        It shares the model's weights. A detector gives what takes one tensor of images and
        returns raw outputs; :meth:`prepare` and :meth:`complete` stand in for the rest.
        """
        return model

    def prepare(self, inputs: Inputs) -> Inputs:
        """From what the model is called with to what the exported module is called with."""
        return inputs

    def complete(self, outputs: dict[str, Tensor], inputs: Inputs) -> Any:
        """From the file's outputs by name to what the model returns for ``inputs``."""
        return only_output(outputs)

    def export_options(self, splits: Splits) -> Mapping[str, Any]:
        """Further arguments of :func:`slimkit.export`, such as open dimensions."""
        return {}

    def metadata(self, splits: Splits) -> dict[str, str]:
        """What an exported file says about its own use, as ONNX metadata."""
        return model_metadata(self.type, splits.preprocessing, splits.classes)

    def predict_script(self, splits: Splits) -> str:
        """The text of a variant's ``predict.py``, which runs the file beside it on its own."""
        return script_of(self.script)

    def predict(self, model: Path, arguments: Sequence[str]) -> None:
        """Run a file as its ``predict.py`` does.

        Args:
            model: the exported file.
            arguments: as on the script's command line.
        """
        importlib.import_module(self.script).main(arguments, model)


def answers_to(
    run: Run, loader: Iterable[Any], device: torch.device | str | None = None
) -> Iterator[Answer]:
    """What ``run`` says to each batch of ``loader``.

    Raises:
        InputError: there is no batch.
    """
    count = 0
    for batch in first_batches(loader):
        moved = batch if device is None else batch.to(device)
        yield run(moved.inputs), moved
        count += 1
    if not count:
        raise InputError("the loader yields no batch", where="loader")


TASKS: Registry[type[Task]] = Registry("task")
"""Name in a recipe → task."""

TASKS.register_lazy("classification", "slimkit.tasks.classification:ClassificationTask")
TASKS.register_lazy("detection", "slimkit.tasks.detection.task:DetectionTask")
TASKS.register_lazy("segmentation", "slimkit.tasks.segmentation.task:SegmentationTask")
