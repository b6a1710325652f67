"""The user's metric: called without gradients, checked to be finite, its failures typed errors."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slimkit.errors import DataError, InputError, SlimkitError
from slimkit.modules import Evaluate

if TYPE_CHECKING:
    from slimkit.quantize.wrapper import QuantizedModel

__all__ = ["EvaluationError", "evaluated", "refuse_test_data"]


class EvaluationError(SlimkitError, RuntimeError):
    """``evaluate`` failed, or gave no finite number.

    Attributes:
        model: what was finished by then, so that nothing is lost: the calibrated network with
            every layer integer; ``None`` if it was not there yet.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        model: QuantizedModel | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.model = model


def evaluated(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    """Evaluate without gradients, in evaluation mode.

    Args:
        evaluate: the user's.
        model: left in evaluation mode.
        what: the network in words, for the error.

    Raises:
        EvaluationError: it raised something, or gave no finite number.
    """
    model.eval()
    try:
        with torch.no_grad():
            value = float(evaluate(model))
    except Exception as error:
        told = getattr(error, "message", f"{type(error).__name__}: {error}")
        raise EvaluationError(f"it failed on {what}: {told}", where="evaluate") from error
    finally:
        model.eval()
    if not math.isfinite(value):
        raise EvaluationError(f"it gave {value} for {what}", where="evaluate")
    return value


def refuse_test_data(evaluate: object) -> None:
    """Look for a loader whose ``role`` is ``"test"`` in what ``evaluate`` holds on to.

    Args:
        evaluate: its attributes, the object that it is a method of, arguments of a
            :func:`functools.partial`, and the variables that a function refers to are looked at.

    Raises:
        InputError: it cannot be called.
        DataError: what is chosen by test data cannot be judged by it.
    """
    if not callable(evaluate):
        raise InputError(
            f"expected a function of the network, got {evaluate!r}",
            where="evaluate",
            hint="evaluate=fn, model → accuracy on validation data",
        )
    for held in _held(evaluate):
        if inspect.ismodule(held):  # some import what they are asked for
            continue
        for holder in (held, getattr(held, "dataset", None)):
            if getattr(holder, "role", None) == "test":
                raise DataError(
                    "test data must not be used to choose what stays in float",
                    where="evaluate",
                    hint="use validation data",
                )


def _held(thing: Any) -> Iterator[Any]:
    """``thing`` and what it refers to, one step deep."""
    yield thing
    if isinstance(thing, functools.partial):
        yield from _held(thing.func)
        yield from (*thing.args, *thing.keywords.values())
    yield from getattr(getattr(thing, "__self__", thing), "__dict__", {}).values()
    function = getattr(thing, "__func__", thing)
    if inspect.isfunction(function):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            seen = inspect.getclosurevars(function)
            yield from (*seen.nonlocals.values(), *seen.globals.values())
        yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
