"""The door of the public verbs: arguments are checked once, by their annotations, before work.

A function or a class that carries :func:`door` refuses what its signature excludes with one
:class:`~slimkit.errors.InputError` that names the argument, what was expected, and the nearest
valid choice. Nothing is caught: an exception from the inside of a verb stays what it is.

Annotations are read at the first call. What they say that cannot be told from a value without
using it up (what an iterator yields) or that only a type checker knows is admitted.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
import stat
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from slimkit.annotations import ANY, Kind, kinds_of
from slimkit.errors import ArtifactError, InputError, nearest

__all__ = ["SignatureError", "check_model", "check_path", "door", "structure_door"]

Thing = TypeVar("Thing", bound=Callable[..., Any])

LEAST: Mapping[str, int] = {
    "at_once": 1,
    "batch": 1,
    "batch_size": 1,
    "batches": 1,
    "every": 1,
    "max_batches": 1,
    "max_steps": 1,
    "observe_steps": 0,
    "round_to": 1,
    "runs": 1,
    "seed": 0,
    "steps": 1,
    "threads": 1,
    "trials": 1,
    "warmup": 0,
    "workers": 0,
}
"""Whole-number argument → its smallest value, wherever a verb has one of that name."""
MOST: Mapping[str, int] = {
    "threads": 4096,  # more than any machine has cores; a runtime reserves memory for each
    "batch": 1 << 20,  # images in one call; memory ends far below
    "warmup": 1 << 20,
    "workers": 4096,
    "seed": (1 << 63) - 1,  # what torch's generators take
}
"""Whole-number argument → its largest value."""
_LARGEST = (1 << 63) - 1
"""Of any whole number: what a tensor, a file or a seed can hold."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
"""Bytes of one part of a path, and of all of it: what file systems take (POSIX)."""
_SHOWN = 60
"""Characters of a value that an error quotes."""


class SignatureError(InputError, TypeError):
    """An argument is missing, or is none that the function has."""


def door(thing: Thing) -> Thing:
    """Check the arguments of a function, or of a class's constructor, by their annotations.

    A model must be an initialised ``nn.Module`` whose parameters and buffers hold values; see
    :func:`check_model`. Numbers are finite, whole ones within :data:`LEAST` and :data:`MOST`, and
    NumPy's become Python's. Names of a ``Literal`` get the nearest one. A pydantic class raises
    :class:`~slimkit.errors.InputError` where it raised a ``ValidationError``, but not inside the
    validation of another class, which collects them.

    Returns:
        The function, wrapped, with its signature and docstring; or the class itself.
    """
    return _hung(thing, values=True)


def structure_door(thing: Thing) -> Thing:
    """As :func:`door`, for verbs that need names and shapes only: meta tensors may enter."""
    return _hung(thing, values=False)


def _hung(thing: Thing, *, values: bool) -> Thing:
    if not isinstance(thing, type):
        return typing.cast("Thing", _checked(thing, values=values))
    constructor: Any = thing.__init__  # type: ignore[misc]
    if hasattr(thing, "__pydantic_validator__"):
        thing.__init__ = _explained(constructor)  # type: ignore[misc]
    else:
        thing.__init__ = _checked(constructor, values=values)  # type: ignore[misc]
    return thing


def _checked(function: Callable[..., Any], *, values: bool) -> Callable[..., Any]:
    """``function`` behind a check of what it is called with."""
    signature = inspect.signature(function)

    @functools.cache
    def kinds() -> Mapping[str, Kind]:
        return {name: kind for name, kind in kinds_of(function, signature) if kind is not ANY}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _not_bound(function, signature, kwargs, error) from None
        expected = kinds()
        for name, value in bound.arguments.items():
            kind = expected.get(name)
            if kind is not None:
                bound.arguments[name] = _admitted(kind, value, name, values=values)
        return function(*bound.args, **bound.kwargs)

    return checked


def _not_bound(
    function: Callable[..., Any],
    signature: inspect.Signature,
    kwargs: Mapping[str, Any],
    error: TypeError,
) -> SignatureError:
    where = function.__qualname__.removesuffix(".__init__")
    known = [name for name in signature.parameters if name not in {"self", "cls"}]
    unknown = [name for name in kwargs if name not in known]
    if unknown and str(error).startswith("got an unexpected"):
        return SignatureError(
            f"it has no argument {unknown[0]!r}", where=where, hint=nearest(unknown[0], known)
        )
    return SignatureError(str(error), where=where, hint=f"its arguments are {', '.join(known)}")


def _explained(constructor: Callable[..., Any]) -> Callable[..., Any]:
    """The constructor of a pydantic class, with its errors typed."""

    @functools.wraps(constructor)
    def explained(self: Any, /, **data: Any) -> None:
        from pydantic import ValidationError

        try:
            constructor(self, **data)
        except ValidationError as error:
            raise _invalid(type(self), error) from error

    # pydantic calls a constructor of one's own inside the validation of other classes as well;
    # this one is to be taken for pydantic's, so that their errors keep their whole path.
    explained.__pydantic_base_init__ = True  # type: ignore[attr-defined]
    return explained


def _invalid(settings: Any, error: Any) -> InputError:
    """The first problem of a pydantic error: which field, what is wrong, what would be right."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or settings.__name__
    hint, context = None, problem.get("ctx", {})
    if "message" in context:  # an error of our own, made for pydantic
        return InputError(context["message"], where=place, hint=context.get("hint") or None)
    if problem["type"] == "extra_forbidden":
        hint = nearest(str(problem["loc"][-1]), settings.model_fields)
    elif problem["type"] == "literal_error":
        choices = context["expected"].replace(" or ", ", ").split(", ")
        hint = nearest(str(problem["input"]), [choice.strip("'") for choice in choices])
    text = problem["msg"].removeprefix("Value error, ")
    got = (
        ""
        if problem["type"] in {"missing", "extra_forbidden"}
        else f", got {_shown(problem['input'])}"
    )
    return InputError(f"{text[:1].lower()}{text[1:]}{got}", where=place, hint=hint)


def _admitted(kind: Kind, value: Any, name: str, *, values: bool) -> Any:
    """``value``, plain where it was one of NumPy's numbers.

    Raises:
        InputError: it is not of this kind.
    """
    if not kind.admits(value):
        place, wanted, found = kind.fault(value, name)
        raise InputError(
            f"expected {wanted.expected}, got {_shown(found)}",
            where=place,
            hint=_hint(wanted, found),
        )
    if kind.module and _is_module(value):
        check_model(value, name, values=values)
    elif kind.path and isinstance(value, (str, os.PathLike)):
        check_path(value, name)
    elif (kind.whole or kind.real) and isinstance(value, numbers.Number):
        value = _plain_number(kind, value)
        if kind.whole and isinstance(value, int) and not isinstance(value, bool):
            _check_bounds(value, name)
    return value


def _plain_number(kind: Kind, value: Any) -> Any:
    if type(value) in (bool, int, float):
        return value
    if kind.whole and isinstance(value, numbers.Integral):
        return int(value)
    return float(value)


def _check_bounds(value: int, name: str) -> None:
    least, most = LEAST.get(name, -_LARGEST - 1), MOST.get(name, _LARGEST)
    if value < least:
        raise InputError(f"expected an integer ≥ {least}, got {_shown(value)}", where=name)
    if value > most:
        raise InputError(f"expected an integer ≤ {most}, got {_shown(value)}", where=name)


def _hint(kind: Kind, value: Any) -> str | None:
    if kind.choices and isinstance(value, str):
        return nearest(value, kind.choices)
    if kind.module and isinstance(value, type):
        return f"{value.__name__} is a class: make a network of it, {value.__name__}(…)"
    if kind.module and isinstance(value, Mapping):
        return "weights are loaded into a network first: model.load_state_dict(…)"
    return None


def check_path(path: str | os.PathLike[str], where: str) -> None:
    """Refuse what no file system takes as a name.

    Raises:
        InputError: it is empty, too long, holds characters that no file name has.
        ArtifactError: it is that of a device, a pipe or a socket.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise InputError(f"expected a path as text, got {_shown(text)}", where=where)
    if not text:
        raise InputError("the path is empty", where=where)
    try:
        encoded = os.fsencode(text)
    except UnicodeError:
        raise InputError(f"{_shown(text)} cannot be the name of a file", where=where) from None
    if b"\0" in encoded:
        raise InputError(f"{_shown(text)} cannot be the name of a file", where=where)
    _check_regular(text)
    longest = max(len(part) for part in encoded.split(os.sep.encode()))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise InputError(
            f"{_shown(text)} is too long: {longest} bytes in one name, {len(encoded)} in all",
            where=where,
            hint=f"at most {_LONGEST_NAME} and {_LONGEST_PATH}",
        )


def _check_regular(path: str) -> None:
    """Refuse a device, a pipe or a socket: it would be replaced, or waited for without end."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):  # there is none, or whoever opens it says what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ArtifactError(
            "this is no regular file but a device, a pipe or a socket", where=str(path)
        )


def _is_module(value: object) -> bool:
    torch: Any = sys.modules.get("torch")  # who has a network has imported it
    return torch is not None and isinstance(value, torch.nn.Module)


def check_model(model: Any, where: str = "model", *, values: bool = True) -> None:
    """Refuse a network that cannot be worked with: not initialised, lazy, without values, nested.

    Args:
        model: a module.
        where: what an error names before the parameter.
        values: whether parameters and buffers must hold values; on the device ``meta`` they have
            shapes only.

    Raises:
        InputError: it is no module; or names the parameter or the module.
    """
    from torch.nn.parameter import is_lazy

    if not _is_module(model):
        raise InputError(f"expected a torch.nn.Module, got {_shown(model)}", where=where)
    try:
        sound = all(_is_sound(tensor, is_lazy, values) for tensor in _tensors(model))
    except AttributeError as error:
        raise InputError(
            f"{type(model).__name__} is not initialised: {error}",
            where=where,
            hint="its __init__ has to call super().__init__() first",
        ) from error
    if sound:  # names cost more than all the rest
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        place = f"{where}.{name}"
        if is_lazy(tensor):
            raise InputError(
                "its shape is not known yet: the layer is lazy",
                where=place,
                hint="run the model once on example inputs",
            )
        if tensor.is_nested:
            raise InputError("it is a nested tensor, which has no shape", where=place)
        if values and tensor.is_meta:
            raise InputError(
                "it is on the device 'meta' and holds no values",
                where=place,
                hint="model.to_empty(device='cpu'), then load its weights",
            )


def _tensors(model: Any) -> Iterator[Any]:
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _is_sound(tensor: Any, is_lazy: Callable[[Any], bool], values: bool) -> bool:
    return not (is_lazy(tensor) or tensor.is_nested or (values and tensor.is_meta))


def _shown(value: object) -> str:
    """A value as an error quotes it: numbers and text themselves, of other things the type."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        digits = value.bit_length() // 4  # hexadecimal; decimal text of huge ones is refused
        return repr(value) if digits < _SHOWN else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value if len(value) <= _SHOWN else value[:_SHOWN]) + "…" * (len(value) > _SHOWN)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (list, tuple)) and 0 < len(value) <= 3:
        inside = ", ".join(_shown(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return type(value).__name__
