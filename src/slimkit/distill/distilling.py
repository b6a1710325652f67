"""The distiller: records a student, asks a teacher, and adds up the losses between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor, nn

from slimkit.distill.recording import Recorder, check_layers, main_tensor, probing, run
from slimkit.distill.settings import DistillLoss, parse_losses
from slimkit.distill.teacher import FrozenTeacher, TeacherPrecision
from slimkit.errors import CheckpointError, InputError, ModelError
from slimkit.inputs import ExampleInputs, as_inputs
from slimkit.plan import load_weights

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["Distiller"]

_PRECISIONS: tuple[str, ...] = get_args(TeacherPrecision)
OUTPUT = ""  # the record of the whole network: its path as a module


class Distiller:
    """Distillation losses for any training loop.

    The student is only listened to through forward hooks, removed by :meth:`close`; the
    teacher is copied, frozen and put into eval mode, whatever mode the caller's is in. The
    loss of the task itself is the loop's business::

        outputs = student(images)
        loss = F.cross_entropy(outputs, labels) + distiller.loss(images, outputs)

    Args:
        student: the model in training.
        teacher: a network that takes the same inputs.
        losses: settings such as ``KD(temperature=4.0)``, or what a recipe says
            (``{"type": "kd"}``).
        example_inputs: one batch, however small; needed by losses with connectors, whose
            parameters must exist before the optimizer is built. With it, class counts and
            feature shapes are checked at once instead of on the first batch.
        precision: how the teacher runs: ``"auto"`` takes bf16 where the device multiplies it
            natively and the arg-max agrees with float32 on ≥ 99 % of the first batch.

    Attributes:
        connectors: the trainable modules between student's and teacher's features.
        last: name of a loss → its weighted value in the latest step, a detached scalar on
            the student's device; they sum to what :meth:`loss` returned.

    Raises:
        InputError: no losses, or example inputs are missing.
        UnknownNameError: a layer or a type of loss does not exist.
        ModelError: student and teacher differ in their classes or features.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Sequence[DistillLoss | Mapping[str, Any]],
        *,
        example_inputs: ExampleInputs | None = None,
        precision: TeacherPrecision = "auto",
    ) -> None:
        self.losses = parse_losses(losses, where="losses")
        if not self.losses:
            raise InputError("there is nothing to distil", where="losses", hint="pass [KD()]")
        self._names = _unique_names(self.losses)
        check_layers(student, filter(None, (loss.student for loss in self.losses)), who="student")
        self._teacher = FrozenTeacher(
            teacher, [loss.teacher_layer or OUTPUT for loss in self.losses], precision
        )
        self._recorder = Recorder(student, [loss.student or OUTPUT for loss in self.losses])
        self.connectors = nn.ModuleDict()
        self.last: dict[str, Tensor] = {}
        self._checked = False
        try:
            self._connect(student, example_inputs)
        except BaseException:
            self.close()
            raise

    @property
    def precision(self) -> str:
        """How the teacher runs; ``"auto"`` until the first batch has decided."""
        return self._teacher.precision

    def loss(self, inputs: ExampleInputs, outputs: Any = None) -> Tensor:
        """The weighted sum of the losses; call it after the student's forward on ``inputs``.

        Args:
            inputs: what the student was called with; the teacher is run on it.
            outputs: what the student returned; None takes what was recorded.

        Returns:
            A float32 scalar with gradient into the student and the connectors.

        Raises:
            InputError: the student has not run since the last call.
            ModelError: the outputs of student and teacher do not fit each other.
        """
        ours = dict(self._recorder.records)
        self._recorder.clear()
        if outputs is not None:
            ours[OUTPUT] = main_tensor(outputs, where="student")
        self._check_recorded(ours)
        theirs = self._teacher(as_inputs(inputs))
        if not self._checked:
            self._check_shapes(ours, theirs)
        device = next(iter(ours.values())).device
        self.last = {}
        with torch.autocast(device.type, enabled=False):
            terms = []
            for index, settings in enumerate(self.losses):
                student = self._connected(index, ours[settings.student or OUTPUT].float())
                teacher = theirs[settings.teacher_layer or OUTPUT]
                terms.append(settings.weight * settings.compute(student, teacher))
                self.last[self._names[index]] = terms[-1].detach()
            return torch.stack(terms).sum()

    def __call__(self, context: StepContext) -> Tensor:
        """:meth:`loss` of a step of :func:`slimkit.train.fit`, for its ``losses=``."""
        return self.loss(context.inputs, context.outputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The connectors' parameters, to be given to the optimizer."""
        return self.connectors.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold so that a resumed run ends like an uninterrupted one.

        Returns:
            The connectors' weights, and how the teacher runs (decided on the first batch).
        """
        choice = torch.tensor(_PRECISIONS.index(self.precision))
        return {**self.connectors.state_dict(prefix="connectors."), "teacher_precision": choice}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state is another distiller's; nothing was loaded.
        """
        prefix = "connectors."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if prefix in key}
        choice = state.get("teacher_precision")
        if choice is None or not 0 <= int(choice) < len(_PRECISIONS):
            raise CheckpointError("this is not the state of a distiller", where="distiller")
        load_weights(self.connectors, weights, where="distiller")
        self._teacher.use(_PRECISIONS[int(choice)])

    def close(self) -> None:
        """Remove all hooks; the student is as it was before."""
        self._recorder.close()
        self._teacher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _connect(self, student: nn.Module, example_inputs: ExampleInputs | None) -> None:
        """Build the connectors and check all shapes, when there are example inputs."""
        if example_inputs is None:
            asking = [loss for loss in self.losses if loss.needs_shapes]
            if asking:
                raise InputError(
                    f"the loss {asking[0].type!r} on {asking[0].student!r} needs them to build "
                    "its connector",
                    where="example_inputs",
                    hint="pass a small batch, or connector='none' where the shapes agree",
                )
            return
        parameter = next(student.parameters(), None)
        inputs = as_inputs(example_inputs)
        if parameter is not None:
            inputs = inputs.to(parameter.device)
        with probing(student):
            run(student, inputs, who="student")
        ours = dict(self._recorder.records)
        self._recorder.clear()
        theirs = self._teacher.probe(inputs)
        self._check_recorded(ours)
        for index, settings in enumerate(self.losses):
            connector = settings.connect(
                tuple(ours[settings.student or OUTPUT].shape),
                tuple(theirs[settings.teacher_layer or OUTPUT].shape),
            )
            if connector is not None:
                device = ours[settings.student or OUTPUT].device
                self.connectors[str(index)] = connector.to(device)
        with torch.no_grad():
            self._check_shapes(ours, theirs)

    def _connected(self, index: int, student: Tensor) -> Tensor:
        if str(index) not in self.connectors:
            return student
        connector = self.connectors[str(index)]
        for parameter in connector.parameters():
            if parameter.device != student.device:  # the model moved after construction
                connector.to(student.device)
            break
        return torch.as_tensor(connector(student))

    def _check_recorded(self, ours: Mapping[str, Tensor]) -> None:
        for settings in self.losses:
            if (settings.student or OUTPUT) not in ours:
                what = f"layer {settings.student!r}" if settings.student else "the network"
                raise InputError(
                    f"{what} has not run since the last call",
                    where="student",
                    hint="call the student on the batch, then distiller.loss once",
                )

    def _check_shapes(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        for index, settings in enumerate(self.losses):
            ours_shape = self._connected(index, ours[settings.student or OUTPUT].float()).shape
            theirs_shape = theirs[settings.teacher_layer or OUTPUT].shape
            if ours_shape == theirs_shape:
                continue
            if settings.student is None and len(ours_shape) == len(theirs_shape) == 2:
                raise ModelError(
                    f"the student has {ours_shape[1]} classes, the teacher {theirs_shape[1]}",
                    where="teacher",
                    hint="both must be trained for the same classes in the same order",
                )
            raise ModelError(
                f"the student's record has shape {tuple(ours_shape)}, "
                f"the teacher's {tuple(theirs_shape)}",
                where=f"{settings.type} on {settings.student or 'the output'}",
                hint="use a connector, or layers whose outputs agree",
            )
        self._checked = True


def _unique_names(losses: Iterable[DistillLoss]) -> list[str]:
    """``kd``, ``mimic:layer3``, and ``kd#2`` for a second one."""
    names: list[str] = []
    for loss in losses:
        base = f"{loss.type}:{loss.student}" if loss.student else loss.type
        number = sum(name.split("#")[0] == base for name in names)
        names.append(f"{base}#{number + 1}" if number else base)
    return names
