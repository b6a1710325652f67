"""What the user's own code raises while a verb runs it: typed, with its exception as the cause.

Only that code is run here, so that an exception of Slimkit's own is never taken for the user's.
Errors of Slimkit pass as they are, and so does what is no ``Exception`` (an interrupt).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from slimkit.errors import CaptureError, DataError, InputError, SlimkitError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["called", "first_line", "iterated", "run_forward", "signalled"]

P = ParamSpec("P")
R = TypeVar("R")
Item = TypeVar("Item")

_LONGEST = 300
"""Characters of a foreign message that an error quotes."""


def first_line(error: BaseException) -> str:
    """``TypeName: first line of its text``, for quoting an error inside another."""
    try:
        text = str(error)
    except Exception:  # a user's own __str__ may raise anything
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:_LONGEST]}" if lines else type(error).__name__


def run_forward(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``model(*args, **kwargs)``.

    Raises:
        CaptureError: the forward raised; names the innermost module of ``model`` that was running.
    """
    try:
        return model(*args, **kwargs)
    except SlimkitError:
        raise
    except Exception as error:  # a user's own forward may raise anything
        path = _running(model, error)
        raise CaptureError(
            f"the forward failed with {first_line(error)}",
            where=path or type(model).__name__,
            hint="check that the model runs on these inputs",
        ) from error


def _running(model: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose method is in the traceback; empty for the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    found, traceback = "", error.__traceback__
    while traceback is not None:
        found = paths.get(id(traceback.tb_frame.f_locals.get("self")), "") or found
        traceback = traceback.tb_next
    return found


def iterated(items: Iterable[Item], *, where: str) -> Iterator[Item]:
    """What ``items`` yields.

    Args:
        items: the user's, such as a loader.
        where: what an error names.

    Raises:
        InputError: it cannot be iterated over.
        DataError: it raised; says behind how many items.
    """
    count = 0
    try:
        source = iter(items)
    except TypeError as error:
        raise InputError(
            f"expected something to iterate over, got {type(items).__name__}", where=where
        ) from error
    while True:
        try:
            item = next(source)
        except StopIteration:
            return
        except SlimkitError:
            raise
        except Exception as error:  # a user's own loader may raise anything
            raise DataError(
                f"it failed behind {count} entries with {first_line(error)}", where=where
            ) from error
        yield item
        count += 1


def called(
    function: Callable[P, R],
    error: type[SlimkitError],
    where: str,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """``function(*args, **kwargs)`` of the user's; one of Slimkit's own raises what it raises.

    Args:
        function: what to call.
        error: type of the error if it raises.
        where: what the error names, such as the argument that ``function`` was.
        *args: for the function.
        **kwargs: for the function.
    """
    try:
        return function(*args, **kwargs)
    except SlimkitError:
        raise
    except Exception as failure:  # the user's own function may raise anything
        if _is_ours(function):
            raise
        raise error(f"it failed with {first_line(failure)}", where=where) from failure


def _is_ours(function: object) -> bool:
    home = getattr(function, "__module__", None) or type(function).__module__
    return home.partition(".")[0] == __name__.partition(".")[0]


def signalled(
    function: Callable[P, R],
    error: type[SlimkitError],
    where: str,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """As :func:`called`, for callbacks: an exception of a class of the user's own passes.

    It is a way to leave a loop (``optuna.TrialPruned``), no mistake.
    """
    try:
        return called(function, error, where, *args, **kwargs)
    except SlimkitError as failure:
        cause = failure.__cause__
        if cause is None or type(cause).__module__ == "builtins":
            raise
        raise cause from None
