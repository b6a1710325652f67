"""The distiller: records a student, asks its teachers, and adds up the losses between them."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor, nn

from slimkit.distill.loss_terms import Given, NetworkComparison
from slimkit.distill.losses.interface import DistillLoss, parse_losses, unique_names
from slimkit.distill.recording.answer_cache import AnswerCache
from slimkit.distill.recording.delivery import Deliveries, Delivery, parse_deliveries
from slimkit.distill.recording.intercepting import ForwardScope
from slimkit.distill.recording.recorder import Recorder, main_tensor, probing, run
from slimkit.distill.recording.records import OUTPUT, Records, Tap
from slimkit.distill.teacher import FrozenTeacher, TeacherPrecision
from slimkit.distill.weighting import (
    SINGLE,
    Teachers,
    TeacherWeights,
    confidence_weights,
    fixed_weights,
    module_name,
    named_teachers,
)
from slimkit.doors import door
from slimkit.errors import CheckpointError, InputError, nearest
from slimkit.inputs import ExampleInputs, Inputs, as_inputs
from slimkit.plan import load_weights

if TYPE_CHECKING:
    from slimkit.train.callbacks import StepContext

__all__ = ["Distiller"]

_PRECISIONS: tuple[str, ...] = get_args(TeacherPrecision)


@door
class Distiller:
    """Distillation losses for any training loop.

    The student is only listened to through forward hooks, removed by :meth:`close`; teachers
    are copied, frozen and put into eval mode, whatever mode the caller's is in. The loss of the
    task itself is the loop's business::

        outputs = student(images)
        loss = F.cross_entropy(outputs, labels) + distiller.loss(images, outputs)

    Args:
        student: the model in training.
        teacher: a network that takes the same inputs; several by name or as a list; or None,
            then every record is the student's own and its deeper layers teach the others.
        losses: settings such as ``KD(temperature=4.0)``, or what a recipe says
            (``{"type": "kd"}``).
        example_inputs: one batch, however small; needed by losses with connectors, whose
            parameters must exist before the optimizer is built. With it, class counts and
            feature shapes are checked at once instead of on the first batch.
        precision: how a teacher runs: ``"auto"`` takes bf16 where the device multiplies it
            natively and the arg-max agrees with float32 on ≥ 99 % of the first batch; or one
            for each teacher.
        teacher_weights: of several teachers, a number for each (they need not sum to 1), or
            ``"confidence"``: on each sample, who is surer of the right label counts more
            (Zhang et al. 2022, arXiv 2201.00007). None is equal weights of sum 1.
        deliveries: functions whose results one network gets from the other; a name alone is
            delivered from the teacher to the student. ``precision="auto"`` is then float32.
        cache_mb: memory for each teacher's answers, found again by the content of each image;
            for images that come again as they are. 0 keeps none.

    Attributes:
        connectors: the trainable modules between student's and teacher's features.
        last: name of a loss → its weighted value in the latest step, a detached scalar on
            the student's device; they sum to what :meth:`loss` returned.

    Raises:
        InputError: no losses; example inputs are missing; a loss asks for what there is not.
        UnknownNameError: a layer, a function or a type of loss does not exist.
        ModelError: student and teacher differ in their classes or features.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teachers,
        losses: Sequence[DistillLoss | Mapping[str, Any]],
        *,
        example_inputs: ExampleInputs | None = None,
        precision: TeacherPrecision | Mapping[str, TeacherPrecision] = "auto",
        teacher_weights: TeacherWeights = None,
        deliveries: Sequence[Delivery | str | Mapping[str, Any]] = (),
        cache_mb: float = 0,
    ) -> None:
        self.losses = parse_losses(losses, where="losses")
        if not self.losses:
            raise InputError("there is nothing to distil", where="losses", hint="pass [KD()]")
        self._names = unique_names(self.losses)
        teachers = named_teachers(teacher)
        _check_named(() if isinstance(precision, str) else precision, teachers, "precision")
        self._by_confidence = teacher_weights == "confidence" and len(teachers) > 1
        self._given_weights = teacher_weights is not None and teacher_weights != "confidence"
        self._weights = fixed_weights(teacher_weights, list(teachers))
        self._groups = [_group(loss, i, list(teachers)) for i, loss in enumerate(self.losses)]
        self._comparisons = {
            name: NetworkComparison(
                [
                    (index, loss)
                    for index, loss in enumerate(self.losses)
                    if name in self._groups[index]
                ],
                student,
                teachers.get(name),
            )
            for name in teachers or (SINGLE,)
        }
        self.last: dict[str, Tensor] = {}
        self._ahead: Records | None = None
        with contextlib.ExitStack() as opened:  # what is open is closed again if the rest fails
            self._deliver(student, deliveries, list(teachers), opened)
            if cache_mb < 0 or (cache_mb and self._delivered):
                raise InputError(
                    "a cached answer draws nothing that could be delivered"
                    if self._delivered
                    else f"expected a number ≥ 0, got {cache_mb!r}",
                    where="cache_mb",
                )
            self._teachers: dict[str, FrozenTeacher] = {}
            for name, network in teachers.items():
                self._teachers[name] = FrozenTeacher(
                    network,
                    self._taps(name),
                    self._precision_of(name, precision),
                    scope=self._deliveries.teaching,
                    cache=AnswerCache(cache_mb) if cache_mb else None,
                )
                opened.callback(self._teachers[name].close)
            taps = {tap for c in self._comparisons.values() for tap in c.taps("student")}
            self._student_taps = sorted(taps, key=lambda tap: tap.key)
            # a detector's output is a list, or in training its losses: nothing to record
            self._reads_output = any(tap.key == OUTPUT for tap in self._student_taps)
            self._recorder = Recorder(student, self._student_taps)
            opened.callback(self._recorder.close)
            self._connect(student, example_inputs)
            self._opened = opened.pop_all()
        # a name alone could be that of a method of modules
        compared = self._comparisons.items()
        modules = {f"student<{module_name(name)}": c.modules for name, c in compared}
        several = len(teachers) > 1
        self.connectors = nn.ModuleDict(modules) if several else next(iter(modules.values()))

    @property
    def precision(self) -> str:
        """How the teachers run; ``"auto"`` until the first batch has decided."""
        return ", ".join(dict.fromkeys(self.precisions.values()))

    @property
    def precisions(self) -> dict[str, str]:
        """How each teacher runs."""
        return {name: teacher.precision for name, teacher in self._teachers.items()}

    def needs(self, argument: str) -> bool:
        """Whether :meth:`loss` must be given ``labels`` or ``ids``."""
        asked = any(comparison.needs(argument) for comparison in self._comparisons.values())
        return asked or (argument == "labels" and self._by_confidence)

    def loss(
        self,
        inputs: ExampleInputs,
        outputs: Any = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        epoch: int | None = None,
        progress: float | None = None,
    ) -> Tensor:
        """The weighted sum of the losses; call it after the student's forward on ``inputs``.

        Args:
            inputs: what the student was called with; the teacher is run on it.
            outputs: what the student returned; None takes what was recorded.
            labels: class numbers (N,), for losses that compare them.
            ids: numbers of the samples (N,), for losses that remember them.
            epoch: from 0; for weights that follow a schedule, as ``progress``.
            progress: part of the run that is over, 0 … 1.

        Returns:
            A float32 scalar with gradient into the student and the connectors.

        Raises:
            InputError: the student has not run since the last call; something is missing that
                a loss needs.
            ModelError: the outputs of student and teacher do not fit each other.
        """
        ours = dict(self._recorder.records)
        self._recorder.clear()
        if outputs is not None and self._reads_output:
            ours[OUTPUT] = main_tensor(outputs, where="student")
        factors = [loss.factor_at(epoch, progress, i) for i, loss in enumerate(self.losses)]
        active = {index for index, factor in enumerate(factors) if factor}
        self._check_recorded(ours)
        theirs = self._ask(as_inputs(inputs), active)
        for name, records in theirs.items():
            if not self._comparisons[name].checked:
                self._comparisons[name].check(ours, records)
        given = Given(labels, ids, inputs.plain if isinstance(inputs, Inputs) else inputs)
        device = next(iter(ours.values())).device
        with torch.autocast(device.type, enabled=False):
            terms = []
            for index, (settings, factor) in enumerate(zip(self.losses, factors, strict=True)):
                value = torch.zeros((), device=device)
                if index in active:
                    value = settings.weight * factor * self._value(index, ours, theirs, given)
                terms.append(value)
            self.last = {n: t.detach() for n, t in zip(self._names, terms, strict=True)}
            return torch.stack(terms).sum()

    def __call__(self, context: StepContext) -> Tensor:
        """:meth:`loss` of a step of :func:`slimkit.train.fit`, for its ``losses=``."""
        batch = getattr(context, "batch", None)
        return self.loss(
            context.inputs if batch is None else batch.inputs,
            context.outputs,
            labels=getattr(context, "targets", None),
            ids=getattr(context, "ids", None),
            epoch=getattr(context, "epoch", None),
            progress=getattr(context, "progress", None),
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters of the connectors, for the optimizer."""
        return self.connectors.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold so that a resumed run ends like an uninterrupted one.

        Returns:
            The connectors' weights, and how the teachers run (decided on the first batch).
        """
        state = dict(self.connectors.state_dict(prefix="connectors."))
        choices = [_PRECISIONS.index(precision) for precision in self.precisions.values()]
        if choices:
            state["teacher_precision"] = torch.tensor(choices if len(choices) > 1 else choices[0])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the state is another distiller's; nothing was loaded.
        """
        prefix = "connectors."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if prefix in key}
        choices = state.get("teacher_precision", torch.tensor([])).flatten().long().tolist()
        valid = all(0 <= choice < len(_PRECISIONS) for choice in choices)
        if not valid or len(choices) != len(self._teachers):
            raise CheckpointError("this is not the state of a distiller", where="distiller")
        load_weights(self.connectors, weights, where="distiller")
        for teacher, choice in zip(self._teachers.values(), choices, strict=True):
            teacher.use(_PRECISIONS[choice])

    def close(self) -> None:
        """Remove all hooks; the student is as it was before."""
        self._opened.close()
        self._ahead = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _taps(self, name: str) -> set[Tap]:
        """What is recorded of one teacher."""
        taps = self._comparisons[name].taps("teacher")
        return taps | {Tap("module", OUTPUT)} if self._by_confidence else taps

    def _precision_of(
        self, name: str, precision: TeacherPrecision | Mapping[str, TeacherPrecision]
    ) -> TeacherPrecision:
        chosen = precision if isinstance(precision, str) else precision.get(name, "auto")
        return "fp32" if chosen == "auto" and self._delivered else chosen

    def _deliver(
        self,
        student: nn.Module,
        deliveries: Sequence[Delivery | str | Mapping[str, Any]],
        names: Sequence[str],
        opened: contextlib.ExitStack,
    ) -> None:
        parsed = parse_deliveries(deliveries)
        if parsed and len(names) != 1:
            raise InputError(
                f"results are delivered between a student and one teacher, not {len(names)}",
                where="deliveries",
            )
        self._delivered = bool(parsed)
        if any(delivery.source == "teacher" for delivery in parsed):
            # before the student's own hooks, which then replay what the teacher got
            opened.callback(ForwardScope(student, self._run_ahead, lambda: None).close)
        self._deliveries = Deliveries(parsed, student)
        opened.callback(self._deliveries.close)

    def _run_ahead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher before the student, which waits for its results."""
        if torch.is_grad_enabled():
            self._ahead = self._teachers[next(iter(self._teachers))](Inputs(args, kwargs))

    def _ask(self, inputs: Inputs, active: set[int]) -> dict[str, Records]:
        """Teacher → records; only of those whose losses count now."""
        ahead, self._ahead = self._ahead, None
        answers: dict[str, Records] = {} if self._teachers else {SINGLE: {}}
        for name, teacher in self._teachers.items():
            if not any(name in self._groups[index] for index in active):
                continue
            asked = bool(self._taps(name))  # not where all records are the student's own
            answers[name] = ahead if ahead is not None else teacher(inputs) if asked else {}
        if answers:
            self._deliveries.check_delivered()
        return answers

    def _value(
        self, index: int, ours: Records, theirs: Mapping[str, Records], given: Given
    ) -> Tensor:
        """One loss over its teachers, without its own weight."""
        names = self._groups[index]
        weights: list[Tensor] | None = None
        if self._by_confidence and len(names) > 1:
            if given.labels is None:
                raise InputError(
                    "the confidence of teachers is judged by labels",
                    where="labels",
                    hint="pass labels= to distiller.loss",
                )
            logits = [theirs[name][OUTPUT] for name in names]
            weights = list(confidence_weights(logits, given.labels))
        values = []
        for number, name in enumerate(names):
            own = weights[number] if weights is not None else None
            asked = Given(given.labels, given.ids, given.inputs, own)
            value = self._comparisons[name](ours, theirs[name], asked, {index})[index]
            values.append(value if own is not None else self._weight(name, index) * value)
        return torch.stack(values).sum()

    def _weight(self, name: str, index: int) -> float:
        """A teacher's weight in a loss; equal ones are shared out among those it learns from."""
        if not self._weights:
            return 1.0
        return self._weights[name] if self._given_weights else 1 / len(self._groups[index])

    def _connect(self, student: nn.Module, example_inputs: ExampleInputs | None) -> None:
        """Build the connectors and check all shapes, when there are example inputs."""
        if example_inputs is None:
            for loss in self.losses:
                loss.check_shapes_known()
            return
        parameter = next(student.parameters(), None)
        inputs = as_inputs(example_inputs)
        if parameter is not None:
            inputs = inputs.to(parameter.device)
        with probing(student):
            run(student, inputs, who="student")
        ours = dict(self._recorder.records)
        self._recorder.clear()
        self._check_recorded(ours)
        for name, comparison in self._comparisons.items():
            teacher = self._teachers.get(name)
            theirs = teacher.probe(inputs) if teacher is not None else {}
            comparison.connect(ours, theirs, student, teacher.copy if teacher else None)

    def _check_recorded(self, ours: Records) -> None:
        for tap in self._student_taps:
            if tap.key not in ours:
                raise InputError(
                    f"{tap.absent} since the last call",
                    where="student",
                    hint="call the student on the batch, then distiller.loss once",
                )


def _group(loss: DistillLoss, index: int, names: Sequence[str]) -> list[str]:
    """The teachers that a loss learns from."""
    _check_named(loss.teachers, names, f"losses.{index}.teachers")
    return list(loss.teachers) or list(names) or [SINGLE]


def _check_named(names: Iterable[str], teachers: Collection[str], where: str) -> None:
    for place, name in enumerate(names):
        if name not in teachers:
            raise InputError(
                f"there is no teacher {name!r}",
                where=f"{where}.{place}" if isinstance(names, Sequence) else f"{where}.{name}",
                hint=nearest(name, teachers),
            )
