"""Records: the tensors of a network that are compared, named in a recipe, found in a model.

Most records are a module's output, and its path says it all: ``student: layer3``. The longer
form reaches the rest::

    {module: head, part: input}                    # what goes into a module
    {module: neck, index: 1}                       # the second of several outputs
    {parameter: fc.weight}                         # a parameter itself
    {function: "torch.nn.functional:softmax"}      # what a function or method returns

Paths may be shell patterns, in which ``*`` stays between two dots: ``layer*`` is ``layer1``,
``layer2`` and so on, not ``layer1.0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from slimkit.doors import door
from slimkit.errors import UnknownNameError, nearest
from slimkit.registry import import_object

__all__ = ["OUTPUT", "Record", "RecordPath", "Records", "Tap", "find_taps", "mistake", "tap_of"]

OUTPUT = ""
"""The key of what the whole network puts out: its path as a module."""

Records = dict[str, Tensor]
"""Key of a tap (``"layer3"``, ``""`` for the output) → its tensor, (N, …)."""

RecordKind = Literal["module", "parameter", "function"]


def mistake(message: str, hint: str = "", path: str = "") -> PydanticCustomError:
    """An error of a validator whose hint and path readers of recipes know how to show."""
    # the message goes through a template: braces in it would be taken for place-holders
    context = {"message": message, "hint": hint, "path": path}
    return PydanticCustomError("slimkit", "{message}", context)


@door
class Record(BaseModel):
    """One tensor of one forward, or several when the name is a pattern that matches several.

    At most one of ``module``, ``parameter`` and ``function``; none of them is the network.

    Attributes:
        module: path or pattern of modules.
        part: what of a module: its ``output`` or its ``input``.
        parameter: path or pattern of parameters.
        function: ``"package.module:function"`` or ``"package.module:Class.method"``, the place
            where the network looks it up when it calls it.
        index: which of several outputs or positional arguments, from 0, or the name of a
            keyword argument or of an entry of a mapping; None for the main tensor.
        call: which of several calls in one forward, from 0; -1 for the last one.
        of: whose tensor it is; None for the side on which it is named. ``student`` as a
            teacher's record makes the student its own teacher (without gradient).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    module: str | None = None
    part: Literal["output", "input"] = "output"
    parameter: str | None = None
    function: str | None = None
    index: Annotated[int, Field(ge=0, le=1_000_000)] | str | None = None
    call: int = Field(default=-1, ge=-1)
    of: Literal["student", "teacher"] | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        named = [n for n in ("module", "parameter", "function") if getattr(self, n) is not None]
        if len(named) > 1:
            raise mistake(f"{named[0]} and {named[1]} are two records", f"drop {named[1]}")
        if self.part == "input" and named not in ([], ["module"]):
            raise mistake(f"a {named[0]} has no input to record", "name a module", "part")
        if self.parameter is not None and (self.index is not None or self.call != -1):
            raise mistake("a parameter is one tensor and is not called", "drop index and call")
        if self.function is not None and ":" not in self.function:
            raise mistake(
                f"{self.function!r} is no import path", "write package.module:function", "function"
            )
        return self

    @property
    def kind(self) -> RecordKind:
        """What is recorded."""
        if self.parameter is not None:
            return "parameter"
        return "function" if self.function is not None else "module"

    @property
    def name(self) -> str:
        """Path, pattern or import path; empty for the network."""
        return self.parameter or self.function or self.module or OUTPUT

    def __str__(self) -> str:
        return self.name if self.kind == "module" else f"{self.kind} {self.name}"


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Record.model_validate(value)  # its errors keep their own paths
    if value is None or isinstance(value, str | Record):
        return value
    raise mistake(
        f"expected a layer, got {type(value).__name__}", "write a path, or {module: PATH}"
    )


RecordPath = Annotated[str | Record, BeforeValidator(_read)]
"""The type of a settings field that names a record: a module's path, or a :class:`Record`."""


@dataclass(frozen=True)
class Tap:
    """One place in one model where a tensor is taken; see :class:`Record` for the attributes."""

    kind: RecordKind
    name: str
    part: Literal["output", "input"] = "output"
    index: int | str | None = None
    call: int = -1

    @property
    def key(self) -> str:
        """Text that names the tensor: ``layer3``, ``head:input``, ``parameter fc.weight``."""
        text = self.name if self.kind == "module" else f"{self.kind} {self.name}"
        text += ":input" if self.part == "input" else ""
        text += f"[{self.index}]" if self.index is not None else ""
        return text + (f"#{self.call}" if self.call != -1 else "")

    @property
    def absent(self) -> str:
        """What to say when a forward left nothing here."""
        if self.kind == "module":
            what = f"layer {self.name!r}" if self.name else "the network"
            return f"{what} has not run" if self.call <= 0 else f"{what} has not run so often"
        return f"the function {self.name!r} has not been called"


def tap_of(layer: str | Tap) -> Tap:
    """A module's path as the tap on its output."""
    return Tap("module", layer) if isinstance(layer, str) else layer


def find_taps(
    record: str | Record | None, model: nn.Module, *, who: str, where: str | None = None
) -> list[Tap]:
    """All places of ``model`` that a record names, in the model's own order.

    Args:
        record: a module's path or pattern, a :class:`Record`, or None for the network's output.
        model: is searched, not run.
        who: ``"student"`` or ``"teacher"``, for the error.
        where: the argument or recipe path to name in the error; by default ``who``.

    Raises:
        UnknownNameError: nothing has that name; with the nearest ones.
    """
    where = where or who
    if not isinstance(record, Record):
        record = Record(module=record)
    if record.kind == "function":
        if not callable(import_object(record.name, where=where)):
            raise UnknownNameError(f"{record.name} cannot be called", where=where)
        return [Tap("function", record.name, index=record.index, call=record.call)]
    if record.kind == "parameter":
        known = [name for name, _ in model.named_parameters()]
        what = f"{who} {type(model).__name__} has no parameter"
        return [Tap("parameter", n) for n in _matching(record.name, known, what, where)]
    names = [OUTPUT]
    if record.name:
        known = [name for name, _ in model.named_modules() if name]
        # a module with two names is known by both
        every = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        known = every if record.name in every else known
        names = _matching(record.name, known, f"{who} {type(model).__name__} has no layer", where)
    return [Tap("module", n, record.part, record.index, record.call) for n in names]


def _matching(pattern: str, known: Iterable[str], what: str, where: str) -> list[str]:
    known = list(known)
    if pattern in known:
        return [pattern]
    found = [name for name in known if _fits(name, pattern)]
    if not found:
        raise UnknownNameError(f"the {what} {pattern!r}", where=where, hint=nearest(pattern, known))
    return found


def _fits(name: str, pattern: str) -> bool:
    """Whether a shell pattern fits a path, part by part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
