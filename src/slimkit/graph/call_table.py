"""The call table: what one captured forward called, and on what, as a value.

Quantizers and masks belong to calls. A later forward need not make the calls that the captured
one made: a cached grid is not computed again, training adds noise or an auxiliary sum, layers
are skipped. So calls are not counted but recognised (data-flow matching): a call is *this
function, in this run of this module, on these operands*. The table holds that key for every
captured call; :mod:`slimkit.graph.alignment` looks calls of other forwards up in it.

Names of operands are local to the running module, so that a module that runs alone, or is
computed again in backward, gives the same names as in the whole forward, and what changes
outside of it does not enter:

===============  ==================================================================================
``in0``          the first tensor among the positional arguments that the module was given
``relu#1``       result of a call that this module made (its address without the path)
``relu#1.2``     the third tensor of such a result
``conv2``        result of a child module; ``head@1`` of its second run
``.weight``      the running module's own parameter or buffer
``/fc.weight``   a parameter of another module
``=0.5``         a Python float; ``y * 1.0`` is not ``y * 0.5``. Whole numbers are left out: they
                 are sizes, and follow the batch
``_``            everything else: constants, cached tensors, keyword arguments, what comes from
                 outside of the module. One name on purpose: cached or computed is the same
===============  ==================================================================================

Arguments and results are *live* operands, made by this forward; the others are *fixed*.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from slimkit.graph.functions import function_of

__all__ = [
    "CONSTANT",
    "CallTable",
    "CapturedCall",
    "Entry",
    "ModuleRun",
    "Operands",
    "TableIndex",
    "first_live",
    "is_live",
    "local",
    "without_floats",
]

CONSTANT = "_"
"""Name of an operand that neither this module nor another made or owns."""

Operands: TypeAlias = tuple[str, ...]
"""Names of operands, in order of the arguments."""


def is_live(operand: str) -> bool:
    """Whether an operand was made by the forward: no parameter, number or constant."""
    return operand[0] not in "./_="


def first_live(operands: Operands) -> str | None:
    """The first operand that the forward made."""
    for operand in operands:
        if operand[0] not in "./_=":
            return operand
    return None


def local(caller: str, label: str) -> str:
    """A run's label as the module that called it names it: ``"conv"`` of ``"block.conv"``."""
    return label[len(caller) + 1 :] if caller and label.startswith(caller + ".") else label


def without_floats(operands: Operands) -> Operands:
    """The operands that are tensors."""
    return tuple([operand for operand in operands if operand[0] != "="])


class CapturedCall(NamedTuple):
    """One call.

    Attributes:
        run: label of the run of the module that made it.
        operands: names of tensors and floats in the arguments.
        new: the result is a new value; dropout in evaluation hands its argument back.
        position: in the order of calls and runs.
    """

    run: str
    operands: Operands
    new: bool
    position: int


class ModuleRun(NamedTuple):
    """One run of a module.

    Attributes:
        caller: label of the run that called it; ``""`` is the whole model's.
        path: of the module.
        operands: names, in the caller, of the tensors among its positional arguments.
        new: as for a call.
        position: likewise.
    """

    caller: str
    path: str
    operands: Operands
    new: bool
    position: int


@dataclass(frozen=True)
class CallTable:
    """What one captured forward called, and on what.

    Attributes:
        calls: address → call.
        runs: label → run of a module. The label is the module's path, and for a second run
            ``"head@1"``.
    """

    calls: Mapping[str, CapturedCall] = field(default_factory=dict)
    runs: Mapping[str, ModuleRun] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> CallTable:
        return self  # nobody changes it

    @cached_property
    def index(self) -> TableIndex:
        """What is looked up in it."""
        return TableIndex(self)

    def restricted(self, addresses: Collection[str]) -> CallTable:
        """The table with these calls only."""
        return CallTable({a: call for a, call in self.calls.items() if a in addresses}, self.runs)

    def to_json(self) -> dict[str, Any]:
        """Operands as one string each, separated by spaces."""
        return {
            "calls": {a: [c.run, " ".join(c.operands), *c[2:]] for a, c in self.calls.items()},
            "runs": {a: [*r[:2], " ".join(r.operands), *r[3:]] for a, r in self.runs.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> CallTable:
        """Read what :meth:`to_json` wrote.

        Raises:
            TypeError, ValueError: it is something else.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"a call table is a mapping, not {type(data).__name__}")
        return cls(
            {
                str(a): CapturedCall(str(run), tuple(operands.split()), bool(new), int(position))
                for a, (run, operands, new, position) in dict(data["calls"]).items()
            },
            {
                str(a): ModuleRun(str(c), str(path), tuple(operands.split()), bool(new), int(k))
                for a, (c, path, operands, new, k) in dict(data["runs"]).items()
            },
        )


Entry: TypeAlias = tuple[str, str | None]
"""An address, and what the result is called then; ``None`` if it is the argument handed back."""


class TableIndex:
    """Ways to find a call or a run in a table.

    Args:
        table: the table.

    Attributes:
        by_key: (run, function, operands) → calls, in order of execution.
        by_parameter: (run, function, name of a parameter) → calls that have it as operand.
        by_all_but_floats: (run, function, tensors among the operands) → calls with floats, too.
        by_latest: (run, function, operand made last) → calls with several live operands.
        by_path: path of a module → labels of its runs.
        by_run: (caller, path, operands) → labels.
    """

    def __init__(self, table: CallTable) -> None:
        self.by_key: dict[tuple[str, str, Operands], list[Entry]] = {}
        self.by_parameter: dict[tuple[str, str, str], list[Entry]] = {}
        self.by_all_but_floats: dict[tuple[str, str, Operands], list[Entry]] = {}
        self.by_latest: dict[tuple[str, str, str], list[Entry]] = {}
        self.by_path: dict[str, list[str]] = {}
        self.by_run: dict[tuple[str, str, Operands], list[str]] = {}
        self._made: dict[tuple[str, str], int] = {}
        for label, run in table.runs.items():
            self._made[run.caller, local(run.caller.partition("@")[0], label)] = run.position
            self.by_path.setdefault(run.path, []).append(label)
            self.by_run.setdefault((run.caller, run.path, run.operands), []).append(label)
        for address, call in table.calls.items():
            self._made[call.run, address.rpartition(":")[2]] = call.position
        for address, call in table.calls.items():
            self._add(address, call)

    def _add(self, address: str, call: CapturedCall) -> None:
        run, function = call.run, function_of(address)
        entry = address, address.rpartition(":")[2] if call.new else None
        self.by_key.setdefault((run, function, call.operands), []).append(entry)
        for operand in call.operands:
            if operand[0] in "./":
                self.by_parameter.setdefault((run, function, operand), []).append(entry)
        rest = without_floats(call.operands)
        if len(rest) < len(call.operands):
            self.by_all_but_floats.setdefault((run, function, rest), []).append(entry)
        latest = self.latest(run, call.operands)
        if latest is not None:
            self.by_latest.setdefault((run, function, latest), []).append(entry)

    def latest(self, run: str, operands: Operands) -> str | None:
        """Of two or more live operands the one that the capture made last."""
        if sum(map(is_live, operands)) < 2:
            return None
        made = self._made
        found = max(operands, key=lambda operand: made.get((run, operand), -1))
        return found if (run, found) in made else None
