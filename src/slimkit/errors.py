"""The errors that Slimkit raises for mistakes made outside of it.

Every public function answers bad input with one of these, and nothing else: the
message names the field, layer or file, what was expected, and the nearest valid
choice. The command line prints the message and exits with :attr:`SlimkitError.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AddressError",
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "GateError",
    "InputError",
    "MissingDependencyError",
    "ModelError",
    "PatternError",
    "PlanError",
    "RecipeError",
    "SlimkitError",
    "TaskError",
    "TeacherError",
    "TrainingError",
    "UnknownNameError",
    "nearest",
]


class SlimkitError(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        message: what is wrong, in one sentence, with the offending value.
        where: the recipe path, layer, argument or file that it is about.
        hint: what to do instead, often the nearest valid choice.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text} ({hint})" if hint else text)


class InputError(SlimkitError, ValueError):
    """An argument has the wrong type, shape or range."""


class UnknownNameError(SlimkitError, LookupError):
    """A name is not in its registry; the nearest registered names are in the hint."""


class PatternError(SlimkitError, LookupError):
    """A name pattern (``ignore``, ``only``, ``skip`` …) matches nothing."""


class AddressError(SlimkitError, RuntimeError):
    """A forward makes other calls than the captured one, and a planned one cannot be told."""


class CaptureError(SlimkitError, RuntimeError):
    """The model cannot be run on the example inputs, or not be followed."""


class ModelError(SlimkitError, ValueError):
    """A model cannot be built, or does not fit its data or its head."""


class PlanError(SlimkitError, ValueError):
    """A plan cannot be made (target out of reach) or does not fit the model."""


class CheckpointError(SlimkitError, ValueError):
    """A state dict does not fit the model that should load it."""


class ArtifactError(SlimkitError, OSError):
    """A file or folder cannot be read or written, or its contents are damaged."""


class DataError(SlimkitError, ValueError):
    """A data source is missing, empty, damaged, or used for what it must not be used for."""


class TrainingError(SlimkitError, RuntimeError):
    """Training cannot go on: the loss is not finite, a callback failed, nothing to train."""


class TaskError(SlimkitError, TypeError):
    """A task lacks a member, or answers in another way than recipes rely on."""


class TeacherError(SlimkitError, ConnectionError):
    """A teacher elsewhere does not answer, refuses, or does not keep to what it announced."""


class ExportError(SlimkitError, RuntimeError):
    """A model cannot be written as ONNX."""


class BackendError(SlimkitError, RuntimeError):
    """A runtime is not installed or refuses a file."""


class MissingDependencyError(SlimkitError, ImportError):
    """An optional library is needed and not installed; the hint is the ``pip install`` line."""


class RecipeError(SlimkitError, ValueError):
    """A recipe is wrong; ``where`` is the path in it, such as ``stages.prune.criterion``."""


class GateError(SlimkitError):
    """A recipe ran to its end, but its result misses a gate of ``require:``."""

    exit_code = 1


def nearest(name: str, choices: Iterable[str], *, limit: int = 3) -> str:
    """A hint that names the valid choices nearest to ``name``.

    Args:
        name: what the user wrote.
        choices: what would have been valid.
        limit: at most so many suggestions.

    Returns:
        ``"did you mean 'l2'?"``, or the list of all choices when nothing is near.
    """
    known = sorted(set(choices))
    if not known:
        return "there are no valid choices"
    by_folded: dict[str, str] = {choice.casefold(): choice for choice in known}
    close = difflib.get_close_matches(str(name).casefold(), by_folded, n=limit, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(by_folded[c]) for c in close) + "?"
    shown = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    return f"choose from: {shown}"
