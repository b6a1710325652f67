"""Name patterns: how a user points at layers (``ignore``, ``only``, ``skip``)."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from slimkit.doors import structure_door
from slimkit.errors import InputError, PatternError, nearest
from slimkit.outside import iterated

__all__ = ["Pattern", "match_modules"]

Pattern = str | type[nn.Module]
"""A shell pattern on module paths or class names (``"layer4.*"``, ``"Linear"``), or a class."""


@structure_door
def match_modules(
    model: nn.Module, patterns: Pattern | Iterable[Pattern], *, where: str = "patterns"
) -> set[str]:
    """The paths of the modules that any of ``patterns`` names, with all modules inside them.

    Args:
        model: the network whose ``named_modules()`` are searched.
        patterns: one or several of: a shell pattern (``*``, ``?``, ``[…]``) compared with
            module paths and with class names, or a module class. ``"layer4"`` and
            ``"layer4.*"`` both take in everything below ``layer4``.
        where: the argument or recipe path to name in the error.

    Raises:
        PatternError: a pattern matches nothing; the hint has the nearest names.
        InputError: a pattern is neither a string nor a module class.
    """
    if isinstance(patterns, str | type):
        patterns = [patterns]
    named = dict(model.named_modules(remove_duplicate=False))
    named.pop("", None)
    matched: set[str] = set()
    for pattern in iterated(patterns, where=where):
        hits = {path for path, module in named.items() if _matches(pattern, path, module, where)}
        if not hits:
            classes = {type(module).__name__ for module in named.values()}
            text = pattern if isinstance(pattern, str) else pattern.__name__
            raise PatternError(
                f"the pattern {text!r} matches no module path and no class name",
                where=where,
                hint=nearest(text, [*named, *classes]),
            )
        matched |= hits
    inside = {path for path in named if any(path.startswith(f"{hit}.") for hit in matched)}
    return matched | inside


def _matches(pattern: Pattern, path: str, module: nn.Module, where: str) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern) or fnmatchcase(type(module).__name__, pattern)
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    raise InputError(
        f"expected a name pattern or a module class, got {pattern!r}",
        where=where,
        hint='for example "layer4.*", "Linear" or torch.nn.Linear',
    )
