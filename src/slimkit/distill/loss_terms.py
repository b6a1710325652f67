"""The losses between two networks: which record goes to which argument, through which module."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimkit.distill.losses.interface import DistillLoss
from slimkit.distill.losses.projection import Shape
from slimkit.distill.recording.delivery import Side
from slimkit.distill.recording.records import OUTPUT, Record, Tap, find_taps
from slimkit.errors import InputError, ModelError, nearest

__all__ = ["Given", "LossTerm", "NetworkComparison"]

GIVEN = ("labels", "ids", "inputs", "sample_weights")
"""Arguments of a loss that are no records; see :class:`Given`."""


@dataclass(frozen=True)
class Given:
    """What losses may ask for besides records.

    Attributes:
        labels: (N,), None when the loop has none.
        ids: numbers of the samples (N,), None when the loop does not know them.
        inputs: what the networks were called with.
        sample_weights: (N,) of the samples for this teacher.
    """

    labels: Tensor | None = None
    ids: Tensor | None = None
    inputs: Any = None
    sample_weights: Tensor | None = None


@dataclass(frozen=True)
class LossTerm:
    """One loss on one pair of records.

    Attributes:
        index: of the loss.
        key: of its modules.
        settings: of the loss.
        taps: argument of ``compute`` → where its record is taken.
        sides: argument → in which network.
        given: other arguments that ``compute`` takes → whether it can do without.
        known: other arguments → whether a module of :meth:`DistillLoss.parts` answers.
    """

    index: int
    key: str
    settings: DistillLoss
    taps: Mapping[str, Tap]
    sides: Mapping[str, Side]
    given: Mapping[str, bool] = field(default_factory=dict)

    def module_key(self, argument: str) -> str:
        """Name of the module for an argument."""
        return self.key if argument == "student" else f"{self.key}_{argument}"

    def keys(self, side: Side) -> Iterator[str]:
        """Keys of the records that it takes from one network."""
        return (tap.key for name, tap in self.taps.items() if self.sides[name] == side)


class NetworkComparison:
    """The losses between a student and one teacher.

    Args:
        losses: settings.
        student: its layers are looked up.
        teacher: the same; None when the student teaches itself.

    Attributes:
        terms: one for every loss and pair of records.
        modules: what the losses train beside the student.

    Raises:
        InputError: a loss asks for something that there is not, or patterns do not pair up.
        UnknownNameError: a layer does not exist.
    """

    def __init__(
        self,
        losses: Sequence[tuple[int, DistillLoss]],
        student: nn.Module,
        teacher: nn.Module | None,
    ) -> None:
        self.terms = [
            term for index, loss in losses for term in _terms(loss, index, student, teacher)
        ]
        self.modules = nn.ModuleDict()
        self.checked = False

    def taps(self, side: Side) -> set[Tap]:
        """Where records are taken in one network."""
        return {
            tap for term in self.terms for arg, tap in term.taps.items() if term.sides[arg] == side
        }

    def needs(self, argument: str) -> bool:
        """Whether a loss cannot do without something of :class:`Given`."""
        return any(term.given.get(argument) is False for term in self.terms)

    def connect(
        self,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        student: nn.Module,
        teacher: nn.Module | None,
    ) -> None:
        """Build all modules for records of these shapes, and check that they fit.

        Raises:
            ModelError: no connector joins two records, or they do not fit each other.
        """
        for term in self.terms:
            shapes: dict[str, Shape] = {}
            layers: dict[str, nn.Module] = {}
            for name, tap in term.taps.items():
                own = term.sides[name] == "student"
                record = (ours if own else theirs)[tap.key]
                network = student if own or teacher is None else teacher
                shapes[name] = tuple(record.shape)
                if tap.kind == "module":
                    layers[name] = network.get_submodule(tap.name)
            device = ours[next(term.keys("student"))].device
            for name, module in term.settings.parts(shapes, layers).items():
                self.modules[term.module_key(name)] = module.to(device)
        self.modules.eval()  # nothing is drawn and no statistics move for a look at shapes
        with torch.no_grad():
            self.check(ours, theirs)
        self.modules.train()

    def check(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Make sure that the records of every term fit each other.

        Raises:
            ModelError: they do not.
        """
        for term in self.terms:
            if "teacher" not in term.taps:
                continue
            student, teacher = (
                self._record(term, name, ours, theirs) for name in ("student", "teacher")
            )
            if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
                continue  # a module made something of its own of them
            if not term.settings.fits(tuple(student.shape), tuple(teacher.shape)):
                raise _misfit(term, tuple(student.shape), tuple(teacher.shape))
        self.checked = True

    def __call__(
        self,
        ours: Mapping[str, Tensor],
        theirs: Mapping[str, Tensor],
        given: Given,
        active: Collection[int],
    ) -> dict[int, Tensor]:
        """Index of a loss → its value, without its weight; of those in ``active``.

        Raises:
            InputError: labels or ids are missing.
        """
        found: dict[int, list[Tensor]] = {}
        for term in self.terms:
            if term.index in active:
                found.setdefault(term.index, []).append(self._value(term, ours, theirs, given))
        joined = {index: torch.stack(values) for index, values in found.items()}
        reduce = {term.index: term.settings.reduce for term in self.terms}
        return {i: v.mean() if reduce[i] == "mean" else v.sum() for i, v in joined.items()}

    def _value(
        self, term: LossTerm, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], given: Given
    ) -> Tensor:
        arguments = {name: self._record(term, name, ours, theirs) for name in term.taps}
        for name in term.settings.modules:
            arguments[name] = self._module(term.module_key(name), ours[next(iter(ours))].device)
        for name, optional in term.given.items():
            value = getattr(given, name)
            if value is not None:
                arguments[name] = value
            elif not optional:
                raise InputError(
                    f"the loss {term.settings.type!r} needs {name}",
                    where=f"losses.{term.index}",
                    hint=_HINTS[name],
                )
        value = term.settings.compute(**arguments)
        if given.sample_weights is not None and "sample_weights" not in term.given:
            value = value * given.sample_weights.mean()
        return value

    def _record(
        self, term: LossTerm, name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
    ) -> Any:
        """One record through its module."""
        own = term.sides[name] == "student"
        record = (ours if own else theirs)[term.taps[name].key].float()
        if name.startswith("teacher"):
            record = record.detach()
        key = term.module_key(name)
        return self._module(key, record.device)(record) if key in self.modules else record

    def _module(self, key: str, device: torch.device) -> nn.Module:
        module = self.modules[key]
        tensors = [*module.parameters(), *module.buffers()]
        if any(tensor.device != device for tensor in tensors):  # the model moved meanwhile
            module.to(device)
        return module


_HINTS = {
    "labels": "pass labels= to distiller.loss",
    "ids": "pass ids= to distiller.loss; a loader that counts its samples tells fit",
    "inputs": "pass the inputs to distiller.loss",
}


def _misfit(term: LossTerm, student: Shape, teacher: Shape) -> ModelError:
    key = term.taps["student"].key
    if key == OUTPUT and len(student) == len(teacher) == 2:
        return ModelError(
            f"the student has {student[1]} classes, the teacher {teacher[1]}",
            where="teacher",
            hint="both must be trained for the same classes in the same order",
        )
    return ModelError(
        f"the student's record has shape {student}, the teacher's {teacher}",
        where=f"{term.settings.type} on {key or 'the output'}",
        hint="use a connector, or layers whose outputs agree",
    )


def _terms(
    loss: DistillLoss, index: int, student: nn.Module, teacher: nn.Module | None
) -> list[LossTerm]:
    """One term for each pair of records that a loss names."""
    where = f"losses.{index}"
    records, given = _arguments(loss, where)
    sides: dict[str, Side] = {}
    taps: dict[str, list[Tap]] = {}
    for name, record in records.items():
        side: Side = "teacher" if name.startswith("teacher") else "student"
        if isinstance(record, Record) and record.of is not None:
            side = record.of
        if teacher is None or side == "student":
            sides[name] = "student"
            taps[name] = find_taps(record, student, who="student", where=f"{where}.{name}")
        else:
            sides[name] = "teacher"
            taps[name] = find_taps(record, teacher, who="teacher", where=f"{where}.{name}")
    count = max(map(len, taps.values()))
    for name, found in taps.items():
        if len(found) not in {1, count}:
            raise InputError(
                f"{records[name]!s} is {len(found)} layers ({_shown(found)}), "
                f"but another record of this loss is {count}",
                where=f"{where}.{name}",
                hint="patterns must match equally many layers, or one",
            )
    return [
        LossTerm(
            index,
            str(index) if count == 1 else f"{index}_{pair}",
            loss,
            {name: found[pair % len(found)] for name, found in taps.items()},
            sides,
            given,
        )
        for pair in range(count)
    ]


def _shown(taps: Sequence[Tap]) -> str:
    names = [tap.key for tap in taps[:4]]
    return ", ".join(names) + (", …" if len(taps) > 4 else "")


def _arguments(
    loss: DistillLoss, where: str
) -> tuple[dict[str, str | Record | None], dict[str, bool]]:
    """What ``compute`` asks for: argument → record, other argument → whether it has a default.

    Raises:
        InputError: an argument is neither; or a record is given that no argument takes.
    """
    fields = type(loss).model_fields
    records: dict[str, str | Record | None] = {}
    given: dict[str, bool] = {}
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    parameters = [
        p for p in inspect.signature(loss.compute).parameters.values() if p.kind not in variable
    ]
    names = [parameter.name for parameter in parameters]
    for parameter in parameters:
        name = parameter.name
        optional = parameter.default is not inspect.Parameter.empty
        if name == "teacher":
            records[name] = loss.teacher_layer
        elif name.startswith(("student", "teacher")) and name in fields:
            records[name] = getattr(loss, name)
        elif name in GIVEN:
            given[name] = optional
        elif name not in loss.modules and not optional:
            known = ["student", "teacher", *GIVEN, *loss.modules]
            known += [n for n in fields if n.startswith(("student_", "teacher_"))]
            raise InputError(
                f"compute() of the loss {loss.type!r} asks for {name!r}, which is no record",
                where=where,
                hint=nearest(name, known),
            )
    if "student" not in records:
        raise InputError(
            f"compute() of the loss {loss.type!r} does not take the student's record",
            where=where,
            hint="name its first argument student",
        )
    for name, record in records.items():
        if name.startswith("teacher_") and record is None:
            records[name] = records.get(name.replace("teacher", "student", 1))
    _check_all_taken(loss, names, where)
    return records, given


def _check_all_taken(loss: DistillLoss, names: Sequence[str], where: str) -> None:
    for name, value in loss:
        if name == "teachers" or name in names or not name.startswith(("student", "teacher")):
            continue
        if isinstance(value, Record) or (name in {"student", "teacher"} and value is not None):
            raise InputError(
                f"compute() of the loss {loss.type!r} takes no {name!r}",
                where=f"{where}.{name}",
                hint=nearest(name, names),
            )
