"""Random programs of one module, run as captured and perturbed, and what became of their calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkit.errors import AddressError
from slimkit.graph import AddressMode, capture
from slimkit.graph.call_table import CallTable

PERTURBATIONS = ("noise", "scaled", "side call", "skipped step")


@dataclass(frozen=True)
class Step:
    """``function`` on earlier values; ``weight`` is the number of a parameter."""

    function: str
    operands: tuple[int, ...]
    weight: int | None = None


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "half": lambda x: x * 0.5,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "sub": lambda x, y: x - y,
}


class Program(nn.Module):
    """Runs its steps, all on maps of one shape, so that each of them can be left out.

    Attributes:
        now: number of the running step; −1 for what a perturbation adds.
        perturbation: (kind, step, operand) of the next forward.
    """

    def __init__(self, seed: int, length: int = 12) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.weights = nn.ParameterList()
        self.steps: list[Step] = []
        for number in range(length):
            function = rng.choice(["conv", "conv", *_UNARY, *_BINARY, "add"])
            recent = max(0, number - 2)  # values 0 … number are known here
            operands = tuple(
                rng.choice([number, rng.randint(recent, number)])
                for _ in range(2 if function in _BINARY else 1)
            )
            weight = None
            if function == "conv":
                weight = len(self.weights)
                self.weights.append(nn.Parameter(torch.randn(4, 4, 1, 1)))
            self.steps.append(Step(function, operands, weight))
        self.now = -1
        self.perturbation: tuple[str, int, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        kind, at, chosen = self.perturbation or ("", -1, 0)
        for number, step in enumerate(self.steps):
            self.now = -1
            if number == at:
                values = self._perturbed(kind, step, values, chosen)
            if number == at and kind == "skipped step":
                values.append(values[step.operands[0]])
                continue
            self.now = number
            values.append(self._run(step, values))
        self.now = -1
        return values[-1]

    def _perturbed(self, kind: str, step: Step, values: list[Tensor], chosen: int) -> list[Tensor]:
        place = step.operands[chosen % len(step.operands)]
        values = list(values)
        if kind == "noise":
            values[place] = values[place] + 0 * torch.randn_like(values[place])
        elif kind == "scaled":
            values[place] = values[place] * 1.0
        elif kind == "side call":
            function = list(_UNARY.values())[chosen % len(_UNARY)]
            function(values[place])
        return values

    def _run(self, step: Step, values: list[Tensor]) -> Tensor:
        operands = [values[operand] for operand in step.operands]
        if step.weight is not None:
            return F.conv2d(operands[0], self.weights[step.weight])
        return (_UNARY.get(step.function) or _BINARY[step.function])(*operands)


class Watch(AddressMode):
    """Notes which step has which address."""

    def __init__(self, program: Program, table: CallTable | None) -> None:
        planned = frozenset() if table is None else frozenset(table.calls)
        super().__init__(program, table, planned)
        self.program = program
        self.seen: list[tuple[str, int, Any]] = []

    def on_call(self, address: str, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        self.seen.append((address, self.program.now, result))
        return result


@dataclass(frozen=True)
class Outcome:
    """Of one perturbed forward: ``"right"``, ``"error"``, ``"same value"`` or ``"silent"``.

    ``"same value"``: a step was left out, and the step that got its address computes exactly what
    the missing one would have: nobody can tell the two programs apart.
    """

    seed: int
    perturbation: tuple[str, int, int]
    verdict: str


def outcomes(seed: int) -> Iterator[Outcome]:
    """One forward per kind of perturbation, each at a random place."""
    rng = random.Random(-1 - seed)
    program, x = Program(seed).eval(), torch.randn(1, 4, 3, 3)
    table = capture(program, x).table
    captured = _watched(program, x, None)
    for kind in PERTURBATIONS:
        program.perturbation = kind, rng.randrange(len(program.steps)), rng.randrange(8)
        try:
            seen = _watched(program, x, table)
        except AddressError:
            yield Outcome(seed, program.perturbation, "error")
            continue
        yield Outcome(seed, program.perturbation, _verdict(seen, captured))


def _watched(program: Program, x: Tensor, table: CallTable | None) -> list[tuple[str, int, Any]]:
    watch = Watch(program, table)
    with torch.no_grad(), watch:
        program(x)
    return watch.seen


def _verdict(seen: list[tuple[str, int, Any]], captured: list[tuple[str, int, Any]]) -> str:
    address_of = {step: address for address, step, _ in captured}
    result_of = {address: result for address, _, result in captured}
    verdict = "right"
    for address, step, result in seen:
        if address == address_of.get(step, address) and (step >= 0 or address not in result_of):
            continue
        if address not in result_of or not torch.equal(result, result_of[address]):
            return "silent"
        verdict = "same value"
    return verdict
