"""Bad and odd arguments for the public verbs of the API, from a seed.

Every verb has a call that works. A case replaces one or two of its arguments by values of
:mod:`benchmarks.fuzz.values` that suit their annotations, leaves one out, or adds one. What comes
back where no error came is judged: it is of the right type, it can be used, and the network that
was given is as it was before.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.fuzz.outcomes import Case
from benchmarks.fuzz.values import POOLS, Make
from benchmarks.fuzz.verbs import FOLDER, VERBS, Verb

__all__ = ["cases"]


def cases(seed: int, count: int) -> Iterator[Case]:
    """``count`` cases, the same for the same seed.

    Args:
        seed: of the choice of verbs, arguments and values.
        count: how many.
    """
    numbers = random.Random(seed)
    shares = [verb.share for verb in VERBS]
    for number in range(count):
        verb = numbers.choices(VERBS, shares)[0]
        yield _case(number, verb, numbers)


def _case(number: int, verb: Verb, numbers: random.Random) -> Case:
    parameters = list(_parameters(verb))
    dropped, added, changed = "", "", {}
    kind = numbers.random()
    if kind < 0.02:
        dropped = numbers.choice(parameters).name
    elif kind < 0.04:
        added = numbers.choice(["models", "ratoi", "x", "args", "self"])
    else:
        for parameter in numbers.sample(parameters, min(len(parameters), 1 + (kind > 0.8))):
            changed[parameter.name] = _value(parameter, numbers)
    told = [f"{name}={label}" for name, (label, _) in changed.items()]
    told += [f"without {dropped}"] * bool(dropped) + [f"with {added}"] * bool(added)
    values = {name: make for name, (_, make) in changed.items()}

    def act() -> object:
        return _act(verb, values, dropped, added)

    return Case(f"{number} {verb.name}({', '.join(told)})", act, bool)


def _parameters(verb: Verb) -> Iterator[inspect.Parameter]:
    for parameter in inspect.signature(verb.call).parameters.values():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield parameter


def _value(parameter: inspect.Parameter, numbers: random.Random) -> tuple[str, Make]:
    """A name and what makes a value that someone may give for ``parameter``."""
    pools = _pools_of(parameter.name, str(parameter.annotation))
    pool = "anything" if numbers.random() < 0.15 else numbers.choice(pools)
    label, make = numbers.choice(list(POOLS[pool].items()))
    return f"{pool}: {label}", make


_BY_NAME: Mapping[str, tuple[str, ...]] = {
    "example_inputs": ("inputs",),
    "inputs": ("inputs",),
    "calibration": ("batches",),
    "batches": ("batches", "number"),
    "loader": ("batches",),
    "ignore": ("pattern",),
    "only": ("pattern",),
    "skip": ("pattern",),
    "unused": ("pattern",),
    "equal": ("pattern", "sequence"),
    "patterns": ("pattern",),
    "teacher": ("model", "mapping"),
    "peers": ("model", "mapping"),
    "losses": ("sequence",),
}
_BY_ANNOTATION: Mapping[str, str] = {
    "nn.Module": "model",
    "PathLike": "path",
    "Callable|Function|Evaluate|Loss|Step|Recover|Objective|Executor": "function",
    "Mapping|dict|Space|Limit|Axes": "mapping",
    "Sequence|Iterable|tuple|list": "sequence",
    r"\bint\b|\bfloat\b|\bbool\b|Bits": "number",
    r"\bstr\b|Literal|Part|Direction": "text",
}


def _pools_of(name: str, annotation: str) -> Sequence[str]:
    if name in _BY_NAME:
        return _BY_NAME[name]
    found = [pool for words, pool in _BY_ANNOTATION.items() if re.search(words, annotation)]
    return found or ["anything"]


def _act(verb: Verb, values: Mapping[str, Make], dropped: str, added: str) -> bool:
    """Make the call in a folder of its own; whether what it returned is right."""
    with _scratch():
        given = verb.arguments()
        given.update({name: make() for name, make in values.items()})
        given.pop(dropped, None)
        if added:
            given[added] = 1
        before = _fingerprint(given.get("model"))
        result = verb.call(**given)
        if not verb.changes and before != _fingerprint(given.get("model")):
            return False
        return verb.fits(result, given)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    before = Path.cwd()
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory(dir=FOLDER.name) as folder,
        warnings.catch_warnings(),
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _fingerprint(model: object) -> object:
    """Weights and modes of a network; None of what is none or does not say."""
    if not isinstance(model, nn.Module):
        return None
    try:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        weights = [(n, t.detach().double().sum().item(), t.requires_grad) for n, t in tensors]
        modes = [module.training for module in model.modules()]
    except Exception:  # whatever an odd network does
        return None
    return repr((weights, modes))
