"""What no captured forward ran: parameters that no operator read, and what could have read them.

Channels that flow into a module that did not run cannot be known by following values. The rule,
with its reasons, is in docs/decisions/0019-what-the-example-did-not-show.md: such a module is
called from the body of the nearest module around it that did run, so it can only read what that
body had in hand (:class:`~slimkit.graph.sight.Sight`), and all of that stays whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from slimkit.errors import PatternError, nearest
from slimkit.graph.capturing import BothModes
from slimkit.graph.patterns import Pattern

__all__ = ["Unseen", "protected_values", "unseen_parts", "without_unused"]


@dataclass(frozen=True)
class Unseen:
    """A module that did not run, or a parameter that nothing read.

    Attributes:
        name: path of the module, or name of the parameter.
        type: class name of the module; ``"parameter"``.
        caller: path of the nearest module around it that ran; ``""`` for the model itself.
        parameters: elements of its parameters.
    """

    name: str
    type: str
    caller: str
    parameters: int

    def __str__(self) -> str:
        return f"{self.name} ({self.type})"


def unseen_parts(model: nn.Module, captured: BothModes) -> list[Unseen]:
    """The outermost modules without any part that ran, and single parameters elsewhere.

    Parameters of one element are left out: they fit any number of channels.

    Args:
        model: the captured model.
        captured: its capture.
    """
    graph = captured.both
    read = {
        name
        for name, value in graph.parameters.items()
        if graph.consumers(value) or value in graph.outputs
    }
    unread = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in read and _size(parameter) > 1
    }
    if not unread:
        return []
    ran = set(captured.sight) | {"", *_around(read)}
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    found: dict[str, Unseen] = {}
    for name, parameter in unread.items():
        outer = list(_around([name]))  # innermost first
        idle = [path for path in outer if path not in ran]
        part = idle[-1] if idle else name
        caller = next((path for path in outer if path in captured.sight and path not in idle), "")
        before = found[part].parameters if part in found else 0
        kind = classes.get(part, "parameter") if idle else "parameter"
        found[part] = Unseen(part, kind, caller, before + _size(parameter))
    return list(found.values())


def without_unused(
    parts: Sequence[Unseen], model: nn.Module, unused: Pattern | Iterable[Pattern]
) -> list[Unseen]:
    """The parts that no pattern names as out of use.

    Args:
        parts: what did not run.
        model: its modules.
        unused: shell patterns of module paths, class names or parameter names, or classes.

    Raises:
        PatternError: a pattern names nothing that did not run.
    """
    modules = dict(model.named_modules())
    left = list(parts)
    for pattern in [unused] if isinstance(unused, str | type) else unused:
        hits = [part for part in parts if _names(pattern, part, modules)]
        if not hits:
            text = pattern if isinstance(pattern, str) else pattern.__name__
            raise PatternError(
                f"the pattern {text!r} matches nothing that did not run: "
                + (", ".join(str(part) for part in parts[:4]) or "every parameter was read"),
                where="unused",
                hint=nearest(text, [part.name for part in parts]),
            )
        left = [part for part in left if part not in hits]
    return left


def protected_values(parts: Iterable[Unseen], captured: BothModes) -> dict[int, str]:
    """Value number → why its channels stay: an unseen part could read them."""
    reasons: dict[int, str] = {}
    for part in parts:
        for value in captured.sight.get(part.caller, {}):
            info = captured.both.tensors.get(value)
            if info is not None and info.name is None:
                why = f"{part.name}, which did not run, may read them"
                reasons.setdefault(value, why)
    return reasons


def _names(pattern: Pattern, part: Unseen, modules: Mapping[str, nn.Module]) -> bool:
    around = [part.name, *(path for path in _around([part.name]) if path)]
    if not isinstance(pattern, str):
        return any(isinstance(modules.get(path), pattern) for path in around)
    names = [*around, *(type(modules[path]).__name__ for path in around if path in modules)]
    return any(fnmatchcase(name, pattern.removesuffix(".*")) for name in names)


def _around(names: Iterable[str]) -> list[str]:
    """The paths of all modules around some names, of each the innermost first."""
    found: dict[str, None] = {}
    for name in names:
        path = name
        while path:
            path = path.rpartition(".")[0]
            found[path] = None
    return list(found)


def _size(parameter: Tensor) -> int:
    lazy = torch.nn.parameter.is_lazy(parameter)
    return 0 if lazy else parameter.numel()
